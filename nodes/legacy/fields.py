"""The inputs of the old nodes. Workflows store widget values by position, so order, defaults and ranges are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ...ipadapter_core import SCALINGS, WEIGHT_TYPES
from .old_node import Embeds, InsightFace, IPAdapterWire

# All but "strong style and composition", which the old pack reached by expand_style alone.
OLD_WEIGHT_TYPES = [name for name in WEIGHT_TYPES if name != "strong style and composition"]
OLD_COMBINES = ["concat", "add", "subtract", "average", "norm average"]

_TOOLTIPS = {
    "model": "The SD1.5, SD2, SDXL or Kolors model that the adapter was made for.",
    "ipadapter": "From IPAdapter Model Loader or a unified loader.",
    "image": "The reference image; try one that shows what the result should take over, near the middle.",
    "image_negative": "What the result should keep away from. Without it a black image is used.",
    "image_style": "The image whose style is used.",
    "image_composition": "The image whose composition is used.",
    "attn_mask": "Where in the result the image prompt acts: 0 nowhere, 1 fully.",
    "mask": "The area of this region, or of the image that is encoded.",
    "clip_vision": "The image encoder. A unified loader brings its own.",
    "insightface": "From IPAdapter InsightFace Loader. The unified loader for FaceID brings its own.",
    "weight": "Strength of the image prompt. Try 0.5 to 0.8 with a text.",
    "weight_style": "Strength of the style. Try 0.8 to 1.",
    "weight_composition": "Strength of the composition. Try 0.8 to 1.",
    "weight_faceidv2": "FaceID Plus v2: strength of the likeness. Try 1 to 2.",
    "weight_kolors": "Kolors FaceID: strength of the Kolors projection. Try 1.",
    "weight_type": "How the weight is spread over the layers. Try linear first.",
    "combine_embeds": "How several images become one prompt. concat keeps all of them.",
    "embeds_scaling": "What the weight multiplies. Try V only first.",
    "start_at": "From which part of the noise schedule on the image prompt acts; 0 is the first step.",
    "end_at": "Up to which part of the noise schedule it acts; 1 is the last step.",
    "expand_style": "Lets the style act in all layers but those of the composition.",
    "sharpening": "Sharpens the image before it is encoded. Try 0 to 0.2.",
    "style_boost": "Weight of the style image in the composition layers' negative branch. Try 1.",
    "composition_boost": "Weight of the image in the other layers' negative branch. Try 0 to 1.",
    "layer_weights": "Weight by layer, such as 3:1.0, 6:0.8. Layers that are not listed get 0.",
    "enhance_tiles": "Into how many tiles a side the image is cut for the encoder. Try 2.",
    "enhance_ratio": "Share of the whole image beside its tiles.",
    "encode_batch_size": "How many images are encoded at once; 0 is all.",
    "pos_embed": "From IPAdapter Encoder.",
    "neg_embed": "From IPAdapter Encoder. Without it a black image is used.",
    "preset": "Which adapter and image encoder to look for in models/ipadapter and models/clip_vision.",
    "provider": "Where the face models run. Try CPU first.",
}


class _Choices(list[str]):
    """A list that ComfyUI can look up in a dict, as it does with the types of V3 inputs."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] - list has None
        return hash(tuple(self))


class Choice(io.Combo.Input):
    """A choice in the notation of V1 nodes, [list, options]: other packs and hosts read the list at index 0."""

    def get_io_type(self) -> Any:
        return _Choices(self.options or ())

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().as_dict().items() if key not in ("options", "multiselect")}


def tip(name: str) -> str | None:
    return _TOOLTIPS.get(name.rstrip("0123456789"))


def choice(name: str, options: Sequence[str], default: str | None = None) -> Choice:
    return Choice(name, options=list(options), default=default, tooltip=tip(name))


def number(name: str, default: float, low: float, high: float, step: float = 0.05) -> Any:
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tip(name))


def whole(name: str, default: int, low: int, high: int, step: int | None = None) -> Any:
    return io.Int.Input(name, default=default, min=low, max=high, step=step, tooltip=tip(name))


def wire(kind: Any, name: str, *, optional: bool = False) -> Any:
    return kind.Input(name, optional=optional, tooltip=tip(name))


def image(name: str, *, optional: bool = False) -> Any:
    return wire(io.Image, name, optional=optional)


def model_and_adapter() -> list[Any]:
    return [wire(io.Model, "model"), wire(IPAdapterWire, "ipadapter")]


def window() -> list[Any]:
    return [number(name, default, 0.0, 1.0, 0.001) for name, default in (("start_at", 0.0), ("end_at", 1.0))]


def weight_type() -> Any:
    return choice("weight_type", OLD_WEIGHT_TYPES)


def combine(default: str | None = None) -> Any:
    return choice("combine_embeds", OLD_COMBINES, default)


def scaling() -> Any:
    return choice("embeds_scaling", SCALINGS)


def encode_batch_size() -> Any:
    return whole("encode_batch_size", 0, 0, 4096)


def negative_and_mask(*, faces: bool = False) -> list[Any]:
    """The optional inputs that nearly all apply nodes have."""
    optional = [
        wire(io.Image, "image_negative", optional=True),
        wire(io.Mask, "attn_mask", optional=True),
        wire(io.ClipVision, "clip_vision", optional=True),
    ]
    return [*optional, wire(InsightFace, "insightface", optional=True)] if faces else optional


def embeds(name: str, *, optional: bool = False) -> Any:
    return wire(Embeds, name, optional=optional)
