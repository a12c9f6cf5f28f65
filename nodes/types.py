"""The types of the wires between the nodes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import AdapterError, AdapterSpec, IPAdapter, LoraLayers
from ..ipadapter_core.image_prompt import BATCH

IPAdapterModel = io.Custom("IP_ADAPTER_MODEL")
ImagePromptType = io.Custom("IMAGE_PROMPT")
LayerWeightsType = io.Custom("LAYER_WEIGHTS")
WeightScheduleType = io.Custom("WEIGHT_SCHEDULE")
AttentionRecordType = io.Custom("ATTENTION_RECORD")

CATEGORY = "image prompt"
SEARCH_ALIASES = ["ip adapter", "ipadapter", "image prompt", "reference image", "style transfer"]
_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def node_schema(**fields: Any) -> io.Schema:
    """An io.Schema of our category, without fields that an older ComfyUI does not support."""
    fields = {"category": CATEGORY, "search_aliases": SEARCH_ALIASES, **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter under ComfyUI's memory management. `name` is its file's, for messages.

    ComfyUI finds `patcher` and keeps the weights while a workflow that uses them runs. `lora` is not part of it: its
    weights are moved to the device with the model that they patch.
    """

    name: str
    patcher: comfy.model_patcher.ModelPatcher
    lora: LoraLayers | None = None

    @property
    def adapter(self) -> IPAdapter:
        return self.patcher.model

    @property
    def spec(self) -> AdapterSpec:
        return self.adapter.spec

    def on_device(self) -> IPAdapter:
        """The adapter, loaded to `patcher.load_device`; ComfyUI may unload it again at any time."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.adapter


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Features of N images, as the adapter's projector takes them, on ComfyUI's intermediate device.

    `image`: image_embeds [N, E] or penultimate hidden states [N, L, E]; `face`: face embeddings [N, F]; None where
    the adapter takes none. `weights`: one for each image, on top of Apply's weight.
    """

    image: Tensor | None = None
    face: Tensor | None = None
    weights: tuple[float, ...] = (1.0,)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def features(self) -> tuple[Tensor, ...]:
        """In the order in which `IPAdapter.encode` takes them."""
        return tuple(feature for feature in (self.face, self.image) if feature is not None)

    def weighted(self, weight: float) -> EncodedImages:
        """The same images, each `weight` times as strong."""
        return dataclasses.replace(self, weights=tuple(weight * own for own in self.weights))


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Encoded images of both branches. `negative` None: zeros, as in training.

    The tokens of all images are joined for every latent, or with `one_each` image i is for latent (frame) i and the
    last one for all remaining. `adapter`: the file they were encoded for; None: unknown. `has_negative`: the user chose
    the negative images. `likeness`: the shortcut scale of FaceID-Plus v2. `tokens`: the projected tokens by adapter.
    """

    positive: EncodedImages
    negative: EncodedImages | None = None
    adapter: str | None = None
    one_each: bool = False
    has_negative: bool = False
    likeness: float = 1.0
    tokens: WeakKeyDictionary[LoadedAdapter, Tensor] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of all images, positive and negative; without negative images the mean weight."""
        own = self.positive.weights
        return (*own, *((sum(own) / len(own),) if self.negative is None else self.negative.weights))

    def weighted(self, weight: float) -> ImagePrompt:
        """The same prompt, `weight` times as strong."""
        negative = None if self.negative is None else self.negative.weighted(weight)
        return dataclasses.replace(self, positive=self.positive.weighted(weight), negative=negative)


def project(ip_adapter: LoadedAdapter, image_prompt: ImagePrompt) -> Tensor:
    """The image prompt -> tokens [P + N, T, D] of its P positive, then of its N negative images; computed once, in fp32
    where ComfyUI puts the adapter, and kept on its intermediate device.

    Raises AdapterError when the features are not the adapter's, or the tokens are not finite.
    """
    if ip_adapter not in image_prompt.tokens:
        adapter, device = ip_adapter.on_device(), ip_adapter.patcher.load_device
        likeness = image_prompt.likeness

        def tokens(images: EncodedImages) -> Tensor:
            parts = zip(*(feature.split(BATCH) for feature in images.features), strict=True)
            on_device = ([feature.to(device, torch.float32) for feature in part] for part in parts)
            return torch.cat([adapter.encode(*part, shortcut_scale=likeness) for part in on_device])

        positive, negative = tokens(image_prompt.positive), image_prompt.negative
        if negative is None and adapter.spec.feature != "image_embeds" and adapter.spec.image_dim is not None:
            raise AdapterError(
                f"The image prompt holds no negative image, and {ip_adapter.name} is a {adapter.spec.kind} adapter, "
                "which needs one. Connect an image prompt to negative of Load Image Prompt: that of a black image, or "
                "the saved neg_embed."
            )
        if negative is None:
            negative_tokens = adapter.negative_tokens(device=device, dtype=torch.float32)
        else:
            negative_tokens = tokens(negative)
        made = torch.cat([positive, negative_tokens])
        if not torch.isfinite(made).all():
            parts = [image_prompt.positive, *([] if negative is None else [negative])]
            if not all(torch.isfinite(feature).all() for part in parts for feature in part.features):
                raise AdapterError(
                    "The image prompt holds NaN or infinity: the image, the mask or the image encoder behind it is "
                    "damaged. Look at the node that makes it."
                )
            raise AdapterError(
                f"{ip_adapter.name} makes tokens with NaN or infinity from features without. Its weights are damaged: "
                "download or export it again."
            )
        image_prompt.tokens[ip_adapter] = made.to(comfy.model_management.intermediate_device())
    return image_prompt.tokens[ip_adapter]


def manage(name: str, adapter: IPAdapter) -> LoadedAdapter:
    """Put an adapter, built with ComfyUI's operations, under ComfyUI's memory management, without its LoRA."""
    lora, adapter.lora = adapter.lora, None
    # Looked up late: ComfyUI replaces the class at start when it streams weights.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return LoadedAdapter(name, patcher, lora)
