"""Image features as int8, half the size of float16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_GROUP = 64  # channels that share a scale


def pack_features(features: Tensor, int8: bool) -> dict[str, Tensor]:
    """Image features [..., E] -> `image_features` of a shard; with `int8` also `image_features_scale` [..., G].

    G groups of 64 channels have a scale each, because a few channels of a vision transformer's hidden states are far
    larger than the others. Where 64 does not divide E, all channels share one.
    """
    if not int8:
        return {"image_features": features}
    channels = features.shape[-1]
    groups = features.float().unflatten(-1, (-1, _GROUP if channels % _GROUP == 0 else channels))
    scales = (groups.abs().amax(-1) / 127).clamp(min=2**-24).half()  # the smallest float16
    values = (groups / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return {"image_features": values.flatten(-2), "image_features_scale": scales}


def unpack_features(stored: Mapping[str, Tensor]) -> Tensor:
    """What `pack_features` stored -> image features [..., E], float16 if they were quantised."""
    features, scales = stored["image_features"], stored.get("image_features_scale")
    if scales is None:
        return features
    groups = features.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float()[..., None]).flatten(-2).half()
