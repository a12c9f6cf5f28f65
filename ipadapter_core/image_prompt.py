"""From pictures to the features of one image prompt: cropping, masking and combining, before the projector."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError

Crop = Literal["center", "top", "bottom", "left", "right", "pad", "stretch"]
CROPS: tuple[Crop, ...] = get_args(Crop)
Combine = Literal["concat", "add", "subtract", "average", "norm average", "max", "min"]
COMBINES: tuple[Combine, ...] = get_args(Combine)

# CLIP's mean colour: zero after the encoder's normalisation, so it says nothing.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def crop_image(
    image: Tensor,
    size: int,
    crop: str = "center",
    *,
    mask: Tensor | None = None,
    fill: tuple[float, float, float] = CLIP_MEAN,
) -> Tensor:
    """The square picture that the encoder sees. image [B, H, W, C] in 0..1 -> [B, size, size, 3] in 0..1.

    The short side is resized to `size` (bicubic, antialiased, as CLIP's preprocessing does) and the square
    is taken where `crop` says; "pad" fills a square with `fill`, "stretch" ignores the aspect ratio. Where
    `mask` ([H, W] or [B, H, W], any size) is 0 the picture becomes `fill`, where it is 1 it stays.

    Raises AdapterError for an unknown crop or a picture that is not [B, H, W, 3 or 4].
    """
    if crop not in CROPS:
        raise AdapterError(f"Unknown crop {crop!r}. Use one of: {', '.join(CROPS)}.")
    if image.ndim != 4 or image.shape[-1] < 3:
        raise AdapterError(f"The image has shape {tuple(image.shape)}. Pass [batch, height, width, 3 channels].")
    pixels = image[..., :3].movedim(-1, 1).float()
    colour = torch.tensor(fill, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
    if mask is not None:
        seen = _fit_mask(mask, pixels)
        pixels = pixels * seen + colour * (1 - seen)
    if crop == "pad":
        pixels = _pad_to_square(pixels, colour)
    height, width = pixels.shape[-2:]
    target = (size, size)
    if crop != "stretch":
        scale = size / min(height, width)
        target = (max(size, round(scale * height)), max(size, round(scale * width)))
    if (height, width) != target:
        pixels = F.interpolate(pixels, size=target, mode="bicubic", antialias=True)
    top, left = _corner(target, size, crop)
    pixels = pixels[..., top : top + size, left : left + size]
    return pixels.clamp(0.0, 1.0).movedim(1, -1)


def combine_features(features: Tensor, combine: str) -> Tensor:
    """Encoder features of N pictures [N, ...] -> [1, ...]; [N, ...] for "concat", whose tokens are joined later.

    add: the sum. subtract: the first minus the mean of the others. average: the mean. norm average: the mean
    of the features, each divided by its norm over the N pictures. max, min: element by element.

    Raises AdapterError for an unknown method.
    """
    if combine not in COMBINES:
        raise AdapterError(f"Unknown combine method {combine!r}. Use one of: {', '.join(COMBINES)}.")
    if combine == "concat" or features.shape[0] == 1:
        return features
    if combine == "add":
        return features.sum(dim=0, keepdim=True)
    if combine == "subtract":
        return features[:1] - features[1:].mean(dim=0, keepdim=True)
    if combine == "average":
        return features.mean(dim=0, keepdim=True)
    if combine == "norm average":
        norm = features.square().sum(dim=0, keepdim=True).sqrt().clamp_min(1e-12)
        return (features / norm).mean(dim=0, keepdim=True)
    return features.amax(dim=0, keepdim=True) if combine == "max" else features.amin(dim=0, keepdim=True)


def join_tokens(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, int]:
    """Tokens [P, T, D] and [N, T, D] -> both as one row of equal length [1, L * T, D], and the images L in it.

    Repeating all tokens of a side leaves its attention as it is (the softmax shares out the same), so the
    shorter side is repeated up to the least common multiple.
    """
    images = math.lcm(positive.shape[0], negative.shape[0])
    rows = [side.repeat(images // side.shape[0], 1, 1).flatten(0, 1)[None] for side in (positive, negative)]
    return rows[0], rows[1], images


def _fit_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """[H, W] or [B, H, W] -> [B, 1, H, W] at the picture's size; the last mask serves the pictures left."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(pixels)
    if mask.shape[-2:] != pixels.shape[-2:]:
        mask = F.interpolate(mask, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    rows = [min(i, mask.shape[0] - 1) for i in range(pixels.shape[0])]
    return mask[rows]


def _pad_to_square(pixels: Tensor, colour: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    side = max(height, width)
    canvas = colour.expand(pixels.shape[0], 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[..., top : top + height, left : left + width] = pixels
    return canvas


def _corner(grid: tuple[int, int], size: int, crop: str) -> tuple[int, int]:
    """Top and left of the square; a side that `crop` does not name is centred."""
    spare_height, spare_width = grid[0] - size, grid[1] - size
    top = {"top": 0, "bottom": spare_height}.get(crop, spare_height // 2)
    left = {"left": 0, "right": spare_width}.get(crop, spare_width // 2)
    return top, left
