"""Random UNets and adapters, and how each pack's Apply is called with them. Import it after `start_comfyui`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor, nn

REAL_WIDTH = 320  # channels of the first level of SD1.5 and SDXL
IMAGE_TOKENS, IMAGE_DIM = 257, 1280  # the penultimate hidden states of ViT-H/14
TOKENS, RESAMPLER_DIM = 16, {"sd15": 768, "sdxl": 1280}  # of the published plus adapters
CONTEXT = {"sd15": 768, "sdxl": 2048}  # the peer tells the families apart by these, so they stay real
FACE_TOKENS, FACE_DIM = {"sd15": 4, "sdxl": 6}, 512  # of the published FaceID-Plus v2 adapters
TEXT_TOKENS = 77
CPU = torch.device("cpu")

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_SHAPES = {
    "sd15": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2] * 4,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}
_HEADS = {
    "sd15": {"num_heads": 8, "num_head_channels": -1},
    "sdxl": {"num_heads": -1, "num_head_channels": 64},
}


def new_unet(
    family: str,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    meta: bool = False,
    device: torch.device = CPU,
) -> comfy.model_patcher.ModelPatcher:
    """A UNet with the layers of SD1.5 or SDXL, `width` channels in its first level, as a MODEL that calculates on this
    device.

    A `meta` one has shapes but no weights: enough to apply an adapter to, not to sample from.
    """
    config = {**_COMMON, **_SHAPES[family], "model_channels": width, "context_dim": CONTEXT[family]}
    supported = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](config)
    supported.unet_config.update(_HEADS[family])
    supported.set_inference_dtype(dtype, None)
    base = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[family]
    place = torch.device("meta") if meta else device
    model = base(supported, model_type=comfy.model_base.ModelType.EPS, device=place)
    if not meta:
        randomise(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=CPU)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1: ComfyUI's modules start uninitialised."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:  # norms and biases
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A random adapter, and the features of images and of the negative branch: `image` [N, 257, 1280], `face` [N, 512]
    or None.
    """

    module: Any
    image: Tensor
    image_negative: Tensor
    face: Tensor | None = None


def new_adapter(
    pack: SimpleNamespace,
    model: Any,
    family: str,
    dtype: torch.dtype,
    *,
    face: bool = False,
    images: int = 1,
    device: torch.device = CPU,
) -> Adapter:
    """A plus adapter of 16 tokens that fits the model, or for a `face` a FaceID-Plus v2 adapter of the published size,
    with weights of `dtype` and this many images. Its weights are made on `device` and lie on the CPU.
    """
    sites = pack.core.cross_attention_sites(model.get_model_object("diffusion_model"))
    widths, context = [site.dim for site in sites], sites[0].cross_attention_dim
    if face:
        options = {"num_tokens": FACE_TOKENS[family], "shortcut": True}
        spec = pack.core.new_spec("faceid-plus", widths, context, image_dim=IMAGE_DIM, **options)
    else:
        options = {"num_tokens": TOKENS, "resampler_dim": RESAMPLER_DIM[family]}
        spec = pack.core.new_spec("plus", widths, context, image_dim=IMAGE_DIM, **options)
    with torch.device(device):
        module = pack.core.IPAdapter(spec, operations=comfy.ops.manual_cast).to(dtype).eval()
    randomise(module)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(images + 1, IMAGE_TOKENS, IMAGE_DIM, generator=generator)
    faces = nn.functional.normalize(torch.randn(images, FACE_DIM, generator=generator)) if face else None
    return Adapter(module.to(CPU), features[:images], features[images:], faces)


class Ours:
    """Apply IP Adapter of this repository, with an image prompt that is already encoded; of several images, one for
    each latent.
    """

    def __init__(self, pack: SimpleNamespace, adapter: Adapter) -> None:
        self.pack, images = pack, len(adapter.image)
        self.loaded = pack.types.manage("benchmark.safetensors", adapter.module)
        face = adapter.face
        positive = pack.types.EncodedImages(adapter.image, face, (1.0,) * images)
        negative = pack.types.EncodedImages(adapter.image_negative, None if face is None else torch.zeros_like(face))
        self.prompt = pack.types.ImagePrompt(positive, negative, self.loaded.name, one_each=images > 1)
        pack.types.project(self.loaded, self.prompt)

    def apply(self, model: Any, end_at: float = 1.0, mask: Tensor | None = None) -> Any:
        """The patched MODEL."""
        options = {"end_at": end_at, "attn_mask": mask}
        return self.pack.ApplyIPAdapter.execute(model, self.loaded, self.prompt, **options).args[0]

    def apply_with_projection(self, model: Any) -> Any:
        """The patched MODEL, with all the work that the peer's Apply does."""
        prompt = dataclasses.replace(self.prompt)
        return self.pack.ApplyIPAdapter.execute(model, self.loaded, prompt).args[0]

    def apply_regions(self, model: Any, masks: Sequence[Tensor]) -> Any:
        """The MODEL with the image prompt in each region, by the node for regions."""
        inputs = {f"mask_{number}": mask for number, mask in enumerate(masks, 1)}
        inputs |= {f"image_prompt_{number}": self.prompt for number in range(1, len(masks) + 1)}
        return self.pack.ImagePromptRegions.execute(model, self.loaded, [], **inputs).args[0]


class OldNode:
    """A node IPAdapterEmbeds, or IPAdapterEmbedsBatch for several images, of either pack. `file` is what it takes as
    an adapter. It runs the image projector itself, in every execution.
    """

    def __init__(self, nodes: Mapping[str, Any], file: Any, adapter: Adapter) -> None:
        self.node = nodes["IPAdapterEmbeds" if len(adapter.image) == 1 else "IPAdapterEmbedsBatch"]()
        self.file, self.adapter = file, adapter

    def apply(self, model: Any, end_at: float = 1.0, mask: Tensor | None = None) -> Any:
        """The patched MODEL."""
        options = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": end_at, "attn_mask": mask}
        images, negative = self.adapter.image, self.adapter.image_negative
        return self.node.apply_ipadapter(model, self.file, images, neg_embed=negative, **options)[0]

    apply_with_projection = apply

    def apply_regions(self, model: Any, masks: Sequence[Tensor]) -> Any:
        """The MODEL with one execution for each region."""
        for mask in masks:
            model = self.apply(model, mask=mask)
        return model


def old_names(pack: SimpleNamespace, adapter: Adapter) -> OldNode:
    """This repository's node under the old pack's name. It leaves out the middle block, as the peer's does."""
    return OldNode(
        vars(pack), pack.wires.AdapterFile(pack.types.manage("benchmark.safetensors", adapter.module)), adapter
    )


def peer_node(package: ModuleType, pack: SimpleNamespace, adapter: Adapter) -> OldNode:
    """The peer's node, with what its loader makes of a file: the same tensors as ours, no copies."""
    file: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in pack.core.export_state(adapter.module).items():
        part, _, name = key.partition(".")
        file[part][name] = tensor
    return OldNode(package.NODE_CLASS_MAPPINGS, file, adapter)


@contextlib.contextmanager
def half_precision_unets() -> Iterator[None]:
    """As if ComfyUI had been started with --fp16-unet: the peer takes its dtype from there, not from the model."""
    before = comfy.cli_args.args.fp16_unet
    comfy.cli_args.args.fp16_unet = True
    try:
        yield
    finally:
        comfy.cli_args.args.fp16_unet = before


def sample(model: Any, family: str, steps: int, size: int, images: int = 1, callback: Any = None) -> Tensor:
    """Latents [images, 4, size, size] of ComfyUI's KSampler with classifier-free guidance, always from the same
    noise.
    """
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, 1, TEXT_TOKENS, CONTEXT[family], generator=generator)
    positive, negative = ([[states, {"pooled_output": torch.zeros(1, 1280)}]] for states in text)
    latent = torch.zeros(images, 4, size, size)
    noise = torch.randn(latent.shape, generator=generator)
    texts = (positive, negative)
    options = {"callback": callback, "disable_pbar": True, "seed": 3}
    return comfy.sample.sample(model, noise, steps, 4.0, "euler", "normal", *texts, latent, **options)
