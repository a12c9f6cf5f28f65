"""Soft masks on the query grid of an attention layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError

# Bicubic filters may leave 0..1 by this much; larger values are in another unit.
OVERSHOOT = 0.25

EMPTY_MASK_ADVICE = (
    "Load Image gives such a mask for an image without transparency: disconnect it, use Load Image (as Mask), or "
    "invert it."
)


def check_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """`mask_planes` in 0..1. Raises AdapterError as it does, and for values outside 0..1."""
    mask = _planes(mask, name)
    check_range(mask, name, "a mask")
    return mask.clamp(0.0, 1.0)


def mask_planes(mask: Tensor, name: str = "mask") -> Tensor:
    """A mask as [M, H, W], finite floating point. A single channel, as in [M, 1, H, W], is dropped.

    `name` is that of the input, for the message.

    Raises AdapterError for another shape, NaN and infinity.
    """
    mask = _planes(mask, name)
    check_finite(mask, name)
    return mask


def _planes(mask: Tensor, name: str) -> Tensor:
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise AdapterError(
            f"{name} has the shape {tuple(mask.shape)}. Connect a MASK of shape [masks, height, width] with at least "
            "one mask, for example from Load Image (as Mask) or Convert Image to Mask."
        )
    mask = mask.reshape(-1, *mask.shape[-2:])
    return mask if mask.is_floating_point() else mask.float()


def check_range(values: Tensor, name: str, what: str) -> None:
    """Check that a batch of masks or images, [B, ...], is in 0..1 but for the overshoot of resampling.

    Raises AdapterError for the first that is not.
    """
    for index, (low, high) in enumerate(_ends(values, name)):
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise AdapterError(
                f"{one_of(name, index, values)} has values from {low:.4g} to {high:.4g}; {what} goes from 0 to 1. "
                "Rescale or clamp it."
            )


def check_finite(values: Tensor, name: str) -> None:
    """Raises AdapterError for NaN or infinity in a batch, [B, ...]."""
    for _ in _ends(values, name):
        pass


def _ends(values: Tensor, name: str) -> Iterator[tuple[float, float]]:
    """The lowest and the highest value of each of a batch. Raises AdapterError for NaN and infinity."""
    for index, one in enumerate(values):
        low, high = (float(end) for end in torch.aminmax(one))  # NaN propagates to both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AdapterError(f"{one_of(name, index, values)} holds NaN or infinity. Look at the node that makes it.")
        yield low, high


def one_of(name: str, index: int, batch: Tensor) -> str:
    """For messages: "image", or "image 2 of 3"."""
    return f"{name} {index + 1} of {len(batch)}" if len(batch) > 1 else name


def check_attention_mask(
    mask: Tensor, name: str = "attn_mask", advice: str = EMPTY_MASK_ADVICE, what: str = "image prompt"
) -> Tensor:
    """`check_mask`, and not all masks of the batch may be 0 everywhere: some frames may do without the image prompt.

    Raises AdapterError as `check_mask` does, and when all masks are 0 everywhere.
    """
    mask = check_mask(mask, name)
    if not mask.any():
        masks = f"All {len(mask)} masks of {name} are" if len(mask) > 1 else f"{name} is"
        raise AdapterError(f"{masks} 0 everywhere, so the {what} would act nowhere. {advice}")
    return mask


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a soft mask to the TRUE (height, width) grid of a layer's queries.

    `mask` is [H, W] or [B, H, W]; returns [B or 1, h*w, 1], which broadcasts over channels. Bilinear and not
    binarised, as in ComfyUI_IPAdapter_plus. The grid is never guessed from an aspect ratio: take it from
    ComfyUI's `activations_shape`, or from `level_grid`.

    Raises AdapterError for a mask of another rank or an empty grid.
    """
    return _resized(mask, grid).flatten(2).transpose(1, 2)


def crop_mask(mask: Tensor, size: tuple[int, int], corner: tuple[int, int], area: tuple[int, int]) -> Tensor:
    """The part of a mask, [B or 1, height, width], over an area (height, width) of a latent of `size`, from its
    corner (top, left) on.

    Raises AdapterError as `resize_mask` does.
    """
    (top, left), (height, width) = corner, area
    return _resized(mask, size)[:, 0, top : top + height, left : left + width]


def select_mask(mask: Tensor, size: tuple[int, int], dim: int, indices: Sequence[int]) -> Tensor:
    """Some rows (dim 2) or columns (dim 3), by `indices`, of a mask [B or 1, height, width] over a latent of `size`.

    Raises AdapterError as `resize_mask` does.
    """
    return _resized(mask, size)[:, 0].index_select(dim - 1, torch.tensor(indices, device=mask.device))


def _resized(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B or 1, 1, height, width]."""
    if mask.ndim not in (2, 3):
        raise AdapterError(f"A mask of shape {tuple(mask.shape)} was given. Pass [H, W] or [B, H, W].")
    if min(grid) < 1:
        raise AdapterError(f"A mask cannot be resized to the grid {grid}. Pass the layer's (height, width).")
    batched = mask.reshape(-1, 1, *mask.shape[-2:])
    if not batched.is_floating_point():
        batched = batched.float()
    if tuple(mask.shape[-2:]) != tuple(grid):
        batched = F.interpolate(batched, size=grid, mode="bilinear", align_corners=False)
    return batched


def level_grid(size: tuple[int, int], queries: int) -> tuple[int, int]:
    """The (height, width) of the UNet level that has this many queries, for a latent of `size` (height,
    width).

    Each level of a Stable Diffusion UNet halves the sides and rounds up (a convolution of stride 2, padding
    1), so the levels of one latent all differ in area and the answer is unique.

    Raises AdapterError when no level has that many queries.
    """
    height, width = size
    while height * width > queries and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != queries:
        raise AdapterError(
            f"A layer with {queries} queries is no level of a {size[0]}x{size[1]} latent (the nearest is "
            f"{height}x{width}). Pass masks only to UNets that halve their grid at each level."
        )
    return height, width
