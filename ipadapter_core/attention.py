"""Decoupled image cross-attention: the term that IP-Adapter adds to the text attention (arXiv 2308.06721, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over split heads: query [B, H, N, d], key and value [B, H, T, d] -> [B, H, N, d]."""

C_PENALTY_DIM = 1280  # channels of the widest layers of SD1.5 and SDXL, where the penalty is 1


class KeyValue(NamedTuple):
    """Image keys and values of one cross-attention layer, each [B, T, C]."""

    key: Tensor
    value: Tensor


def scale_keys_values(
    key_value: KeyValue,
    weight: float | Tensor = 1.0,
    scaling: Scaling = "V only",
) -> tuple[KeyValue, float | Tensor]:
    """Fold `weight` into keys and values once, before sampling.

    `key_value` holds [B, T, C] tensors, a row for each image, because the mean of "K+mean(V)" is taken per image;
    `weight` is a number or a tensor of B numbers.

    Returns the scaled pair and the weight for `image_attention`: unchanged for "V only" (attention is linear in V, so
    this is exact), 1.0 for the other modes, which are those of ComfyUI_IPAdapter_plus.

    Raises AdapterError for an unknown mode.
    """
    if scaling == "V only":
        return key_value, weight
    if scaling not in SCALINGS:
        raise AdapterError(f"Unknown embeds scaling {scaling!r}. Use one of: {', '.join(SCALINGS)}.")
    key, value = key_value
    rows = _per_row(weight, key)
    if scaling != "K+V":
        rows = rows * (key.shape[-1] / C_PENALTY_DIM)
    if scaling == "K+mean(V) w/ C penalty":
        mean = value.mean(dim=1, keepdim=True)  # scaled, while the differences between the tokens stay
        return KeyValue(key * rows, (value - mean) + mean * rows), 1.0
    return KeyValue(key * rows, value * rows), 1.0


def image_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
    attend: Attend = F.scaled_dot_product_attention,
) -> Tensor:
    """Attention of the image's queries to the image tokens, to be ADDED to the text attention before `to_out`.

    query [B, N, C]; key and value [B or 1, T, C]; `weight` a number or a tensor of B numbers; `mask` [B or 1, N, 1]
    (see `resize_mask`). Returns [B, N, C] in the query's dtype.

    Raises AdapterError when the channels or the batch sizes do not fit.
    """
    try:
        keys, values = (
            split_heads(part.to(query.dtype), heads).expand(query.shape[0], -1, -1, -1) for part in (key, value)
        )
        out = attend_to_heads(query, keys, values, attend=attend)
    except RuntimeError:  # looked into only now: this runs in every layer of every step
        _check_shapes(query, key, value, heads)
        raise
    if isinstance(weight, Tensor) or weight != 1.0:
        out = out * _per_row(weight, out)
    return out if mask is None else out * mask.to(out)


def attend_to_heads(
    query: Tensor, key: Tensor, value: Tensor, *, attend: Attend = F.scaled_dot_product_attention
) -> Tensor:
    """Attention of query [B, N, H * d] to keys and values with split heads, [B, H, T, d]. Returns [B, N, H * d]."""
    out = attend(split_heads(query, key.shape[1]), key, value)
    return out.transpose(1, 2).reshape(query.shape)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * d] -> [B, H, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    batch, _, channels = query.shape
    if channels % heads or key.shape[-1] != channels or value.shape != key.shape:
        raise AdapterError(
            f"Image attention: queries are {channels} wide with {heads} heads, keys are {tuple(key.shape)} and values "
            f"{tuple(value.shape)}. They must have the same channels; use the layer that has this id."
        )
    if key.shape[0] not in (1, batch):
        raise AdapterError(
            f"Image attention: {key.shape[0]} rows of image keys for a batch of {batch}. Pass 1 row or {batch} rows."
        )


def _per_row(weight: float | Tensor, like: Tensor) -> Tensor | float:
    """[B] -> [B, 1, 1] in the dtype and on the device of `like`; numbers pass through."""
    if not isinstance(weight, Tensor):
        return weight
    return weight.to(like).reshape(-1, 1, 1)
