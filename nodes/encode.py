"""EncodeImagePrompt: images -> what the image encoder makes of them."""

from __future__ import annotations

import comfy.clip_vision
import comfy.model_management
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..ipadapter_core import AdapterError
from ..ipadapter_core.encoders import download_hint, needed_features
from ..ipadapter_core.image_prompt import CLIP_MEAN, COMBINES, CROPS, combine_features, crop_image
from .checks import check_encoder
from .types import EncodedImages, ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema, project

TRAINED, BLACK = "as in training", "black image"
NEGATIVES = [TRAINED, BLACK]
Encoder = comfy.clip_vision.ClipVisionModel


class EncodeImagePrompt(io.ComfyNode):
    """Pictures -> one image prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="EncodeImagePrompt",
            display_name="Encode Image Prompt",
            description="Turns one or several pictures into an image prompt, and shows what the encoder sees of them.",
            inputs=[
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter that reads the pictures."),
                io.ClipVision.Input("clip_vision", tooltip="The adapter's image encoder, from Load IP Adapter."),
                io.Image.Input("image", tooltip="The picture; a batch of pictures becomes one prompt, see combine."),
                io.Image.Input(
                    "image_negative",
                    optional=True,
                    tooltip="What the result should keep away from. Without it, see negative.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Hides parts of the picture from the encoder: 0 hidden, 1 seen."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    optional=True,
                    tooltip="Strength of this prompt; it multiplies the weight of Apply IP Adapter.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINES),
                    default="concat",
                    optional=True,
                    tooltip="How several pictures become one prompt. concat keeps the tokens of all; the others "
                    "calculate one set of features (subtract: the first minus the mean of the others).",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    optional=True,
                    tooltip="The encoder sees a square: which part of the picture to keep, or pad or stretch it.",
                ),
                io.Combo.Input(
                    "negative",
                    options=NEGATIVES,
                    default=TRAINED,
                    optional=True,
                    tooltip="The picture of the negative branch when image_negative is not connected: what the adapter "
                    "was trained with (no features, or zero pixel values), or a black image.",
                ),
            ],
            outputs=[ImagePromptType.Output(display_name="image_prompt", tooltip="For Apply IP Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: LoadedAdapter,
        clip_vision: Encoder,
        image: Tensor,
        image_negative: Tensor | None = None,
        mask: Tensor | None = None,
        weight: float = 1.0,
        combine: str = "concat",
        crop: str = "center",
        negative: str = TRAINED,
    ) -> io.NodeOutput:
        if ip_adapter.spec.face_width is not None:
            raise AdapterError(
                f"{ip_adapter.name} is a {ip_adapter.spec.kind} adapter, which takes face embeddings. Connect it to "
                "Encode Face Prompt."
            )
        check_encoder(clip_vision, "The connected image encoder")
        fill = tuple(getattr(clip_vision, "image_mean", CLIP_MEAN))
        size = clip_vision.image_size
        seen = crop_image(image, size, crop, mask=mask, fill=fill)
        features = combine_features(encode(ip_adapter, clip_vision, seen), combine)
        if image_negative is not None:
            unwanted = crop_image(image_negative, size, crop, fill=fill, name="image_negative")
            against = combine_features(encode(ip_adapter, clip_vision, unwanted), combine)
        else:
            against = negative_features(ip_adapter, clip_vision, negative)
        prompt = ImagePrompt(
            EncodedImages(features, weights=(weight,) * len(features)),
            None if against is None else EncodedImages(against, weights=(weight,) * len(against)),
            ip_adapter.name,
            has_negative=image_negative is not None,
        )
        project(ip_adapter, prompt)  # here, where a damaged adapter is to be named, and not again in Apply
        return io.NodeOutput(prompt, ui=ui.PreviewImage(seen.cpu(), cls=cls))


def encode(ip_adapter: LoadedAdapter, clip_vision: Encoder, pictures: Tensor) -> Tensor:
    """Square pictures [B, S, S, 3] in 0..1 -> the features that the adapter takes.

    Raises AdapterError when the encoder is not the adapter's, or damaged.
    """
    output = clip_vision.encode_image(pictures, crop=False)
    return _checked(
        ip_adapter, output["image_embeds" if ip_adapter.spec.kind == "base" else "penultimate_hidden_states"]
    )


def negative_features(ip_adapter: LoadedAdapter, clip_vision: Encoder, negative: str) -> Tensor | None:
    """The features of the negative branch; None stands for zeros of image_embeds, as base adapters are trained."""
    spec = ip_adapter.spec
    size = clip_vision.image_size
    if negative == BLACK or spec.negative == "black":
        return encode(ip_adapter, clip_vision, torch.zeros(1, size, size, 3))
    if spec.kind == "base":
        return None
    comfy.model_management.load_models_gpu([clip_vision.patcher])
    # Zero after normalisation, which no picture given to encode_image can be exactly.
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    states = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1]
    return _checked(ip_adapter, states.to(comfy.model_management.intermediate_device()))


def _checked(ip_adapter: LoadedAdapter, features: Tensor) -> Tensor:
    spec = ip_adapter.spec
    tokens_differ = spec.kind == "full" and features.shape[1] != spec.tokens
    if features.shape[-1] != spec.image_width or tokens_differ:
        tokens = f", {features.shape[1]} tokens" if spec.kind == "full" else ""
        kind = "image_embeds" if spec.kind == "base" else "hidden states"
        raise AdapterError(
            f"The connected image encoder makes {kind} of {features.shape[-1]}{tokens}; {ip_adapter.name} takes "
            f"{needed_features(spec)}. Connect the clip_vision of Load IP Adapter, or download {download_hint(spec)}, "
            "into models/clip_vision."
        )
    if not (torch.isfinite(features).all() and features.flatten(1).any(1).all()):
        found = "nothing but 0" if torch.isfinite(features).all() else "NaN or infinity"
        raise AdapterError(
            f"The connected image encoder makes {found} of a sound image. Its file is damaged: download "
            f"{download_hint(spec)}, into models/clip_vision."
        )
    return features
