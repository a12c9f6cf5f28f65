"""Image features as int8, half the size of float16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_GROUP = 64  # channels that share a scale


def pack_features(features: Tensor, int8: bool) -> dict[str, Tensor]:
    """Image features [..., E] as the tensors of a shard."""
    names = ("image_features", "image_features_scale")
    return dict(zip(names, quantise(features) if int8 else (features,), strict=False))


def unpack_features(stored: Mapping[str, Tensor]) -> Tensor:
    """The image features that `pack_features` stored."""
    features, scales = stored["image_features"], stored.get("image_features_scale")
    return features if scales is None else dequantise(features, scales)


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [..., E] -> int8 [..., E] and float16 scales [..., E / 64].

    64 channels share a scale, because a few channels of a vision transformer's hidden states are far larger than the
    others. Where 64 does not divide E, all channels share one.
    """
    channels = features.shape[-1]
    groups = features.float().unflatten(-1, (-1, _GROUP if channels % _GROUP == 0 else channels))
    scales = (groups.abs().amax(-1) / 127).clamp(min=2**-24).half()  # the smallest float16
    values = (groups / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return values.flatten(-2), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """The result of `quantise` -> float16 [..., E]."""
    groups = values.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float()[..., None]).flatten(-2).half()
