"""Soft masks on the query grid of an attention layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError


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
