"""Image features: encoded in batches, and cached while the image is in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import comfy.clip_vision
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ipadapter_core import AdapterError
from ..ipadapter_core.encoders import encoder_advice, needed_features
from ..ipadapter_core.image_prompt import BATCH, CLIP_MEAN, crop_image
from ..ipadapter_core.tiles import tile_image
from .run import remember
from .types import LoadedAdapter

TRAINED, BLACK = "as in training", "black image"
NEGATIVES = [TRAINED, BLACK]
Encoder: TypeAlias = comfy.clip_vision.ClipVisionModel

_REMEMBERED = 2  # ways to look at the same images


@dataclass(frozen=True, eq=False)
class _Memo:
    """A cache of tensors by one or more objects, while all of them are in memory."""

    made: dict[Hashable, Tensor] = field(default_factory=dict)
    below: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def remember(self, objects: Sequence[Any], options: Hashable, make: Callable[[], Tensor]) -> Tensor:
        memo = self
        for key in objects:
            memo = cast("_Memo", memo.below.setdefault(key, _Memo()))
        return remember(memo.made, options, make, _REMEMBERED)


_memo = _Memo()


def encode_images(
    ip_adapter: LoadedAdapter,
    clip_vision: Encoder,
    image: Tensor,
    *,
    crop: str = "center",
    mask: Tensor | None = None,
    tiles: int = 0,
    name: str = "image",
) -> tuple[Tensor, Tensor]:
    """image [B, H, W, C] -> its features, and the squares that the encoder sees: one for each image, then the tiles.

    The encoder runs once for the same image and mask, as long as both of them live.

    Raises AdapterError as `encode`, `crop_image` and `tile_image` do.
    """
    fill, size = mean_colour(clip_vision), clip_vision.image_size
    seen = crop_image(image, size, crop, mask=mask, fill=fill, name=name)
    if tiles:
        seen = torch.cat([seen, tile_image(image, size, tiles, mask=mask, fill=fill, name=name)])
    features = _memo.remember(
        (clip_vision, image, image if mask is None else mask),
        (_output(ip_adapter), crop, tiles),
        lambda: encode(ip_adapter, clip_vision, seen),
    )
    return _fitting(ip_adapter, features), seen


def mean_colour(clip_vision: Encoder) -> tuple[float, float, float]:
    """The colour that is 0 after the encoder's normalisation."""
    red, green, blue = getattr(clip_vision, "image_mean", CLIP_MEAN)
    return red, green, blue


def encode(ip_adapter: LoadedAdapter, clip_vision: Encoder, images: Tensor) -> Tensor:
    """Square images [B, S, S, 3] in 0..1 -> the features that the adapter takes.

    Raises AdapterError when the encoder is not the adapter's, or damaged.
    """
    progress = comfy.utils.ProgressBar(len(images))
    made: list[Tensor] = []
    for part in images.split(BATCH):
        comfy.model_management.throw_exception_if_processing_interrupted()
        output = clip_vision.encode_image(part, crop=False)
        made.append(sound_features(ip_adapter, output[_output(ip_adapter)]))
        progress.update(len(part))
    return torch.cat(made)


def negative_features(ip_adapter: LoadedAdapter, clip_vision: Encoder, negative: str) -> Tensor | None:
    """The features of the negative branch; None for zeros of image_embeds, as in the training of base adapters."""
    spec = ip_adapter.spec
    size = clip_vision.image_size
    kind = (_output(ip_adapter), negative == BLACK or spec.negative == "black")
    if kind[1]:
        black = torch.zeros(1, size, size, 3)
        features = _memo.remember((clip_vision,), kind, lambda: encode(ip_adapter, clip_vision, black))
    elif spec.kind == "base":
        return None
    else:
        features = _memo.remember((clip_vision,), kind, lambda: _encode_zeros(ip_adapter, clip_vision))
    return _fitting(ip_adapter, features)


def _encode_zeros(ip_adapter: LoadedAdapter, clip_vision: Encoder) -> Tensor:
    """Hidden states of zeros after normalisation, which no image given to encode_image can be exactly."""
    comfy.model_management.load_models_gpu([clip_vision.patcher])
    size = clip_vision.image_size
    pixels = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    states = clip_vision.model(pixel_values=pixels, intermediate_output=-2)[1]
    return sound_features(ip_adapter, states.to(comfy.model_management.intermediate_device()))


def _output(ip_adapter: LoadedAdapter) -> str:
    """The encoder's output that the adapter takes."""
    return "image_embeds" if ip_adapter.spec.kind == "base" else "penultimate_hidden_states"


def sound_features(ip_adapter: LoadedAdapter, features: Tensor) -> Tensor:
    """Checks features: of the right encoder, finite and not 0."""
    _fitting(ip_adapter, features)
    if not (torch.isfinite(features).all() and features.flatten(1).any(1).all()):
        found = "nothing but 0" if torch.isfinite(features).all() else "NaN or infinity"
        raise AdapterError(
            f"The connected image encoder makes {found} of a sound image. Its file is damaged. "
            f"{encoder_advice(ip_adapter.spec)}"
        )
    return features


def _fitting(ip_adapter: LoadedAdapter, features: Tensor) -> Tensor:
    """Checks features against the dims that the adapter takes."""
    spec = ip_adapter.spec
    tokens_differ = spec.kind == "full" and features.shape[1] != spec.num_tokens
    if features.shape[-1] != spec.image_dim or tokens_differ:
        tokens = f", {features.shape[1]} tokens" if spec.kind == "full" else ""
        kind = "image_embeds" if spec.kind == "base" else "hidden states"
        raise AdapterError(
            f"The connected image encoder makes {kind} of {features.shape[-1]}{tokens}; {ip_adapter.name} takes "
            f"{needed_features(spec)}. Connect the clip_vision of Load IP Adapter. If it finds none: "
            f"{encoder_advice(spec)}"
        )
    return features
