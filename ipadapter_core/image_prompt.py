"""Before the projector: crop and mask images for the encoder, combine the features of several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError
from .masks import EMPTY_MASK_ADVICE, check_mask, check_range, one_of

Crop = Literal["center", "top", "bottom", "left", "right", "pad", "stretch"]
CROPS: tuple[Crop, ...] = get_args(Crop)
Combine = Literal["concat", "add", "subtract", "average", "norm average", "max", "min"]
COMBINES: tuple[Combine, ...] = get_args(Combine)

# CLIP's mean colour: zero after the encoder's normalisation.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

BATCH = 16  # images at a time: a video must not be in memory twice
_LONG = 32  # the aspect ratio from which an image is a strip; shorter ones are resized whole, exactly as CLIP does
_MARGIN = 2  # squares around the one that is kept: more than the reach of the bicubic filter


def crop_image(
    image: Tensor,
    size: int,
    crop: str = "center",
    *,
    mask: Tensor | None = None,
    fill: tuple[float, float, float] = CLIP_MEAN,
    name: str = "image",
) -> Tensor:
    """The square input of the encoder. image [B, H, W, C] in 0..1 -> [B, size, size, 3] in 0..1.

    The short side is resized to `size` (bicubic, antialiased, as CLIP's preprocessing does) and the square
    is taken where `crop` says; "pad" fills a square with `fill`, "stretch" ignores the aspect ratio. Where
    `mask` ([H, W] or [B, H, W], any size) is 0 the image becomes `fill`, where it is 1 it stays. One channel is
    grey, a fourth (alpha) is dropped. `name` is that of the input, for messages.

    Raises AdapterError for an unknown crop, an image that is not [B, H, W, 1, 3 or 4] or not in 0..1, and a mask that
    hides all that the encoder would see of an image.
    """
    if crop not in CROPS:
        raise AdapterError(f"Unknown crop {crop!r}. Use one of: {', '.join(CROPS)}.")
    pixels = rgb_pixels(image, name)
    colour = torch.tensor(fill, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
    masks = None if mask is None else _fit_mask(mask, pixels, size, crop)
    squares: list[Tensor] = []
    for first in range(0, len(pixels), BATCH):
        part = pixels[first : first + BATCH]
        if masks is not None:
            seen = masks[last_for_all(len(masks), range(first, first + len(part)))]
            part = part * seen + colour * (1 - seen)
        if crop == "stretch":
            square = _resize(part, (size, size))
        elif crop == "pad":
            square = _pad_to_square(part, size, colour)
        else:
            square = _crop_to_square(part, size, crop)
        squares.append(square.clamp(0.0, 1.0).movedim(1, -1))
    return torch.cat(squares)


def combine_features(features: Tensor, combine: str) -> Tensor:
    """Encoder features of N images [N, ...] -> [1, ...]; [N, ...] for "concat", whose tokens are joined later.

    add: the sum. subtract: the first minus the mean of the others. average: the mean. norm average: the mean
    of the features, each divided by its norm over the N images. max, min: element by element.

    Raises AdapterError for an unknown method, and when "subtract" leaves nothing.
    """
    if combine not in COMBINES:
        raise AdapterError(f"Unknown combine method {combine!r}. Use one of: {', '.join(COMBINES)}.")
    if combine == "concat" or features.shape[0] == 1:
        return features
    if combine == "add":
        return features.sum(dim=0, keepdim=True)
    if combine == "subtract":
        left = features[:1] - features[1:].mean(dim=0, keepdim=True)
        if left.abs().amax() <= 1e-5 * features.abs().amax():
            raise AdapterError(
                "combine 'subtract' leaves nothing: the first image is the same as the mean of the others. Connect "
                "different images, or choose another combine."
            )
        return left
    if combine == "average":
        return features.mean(dim=0, keepdim=True)
    if combine == "norm average":
        norm = features.square().sum(dim=0, keepdim=True).sqrt().clamp_min(1e-12)
        return (features / norm).mean(dim=0, keepdim=True)
    return features.amax(dim=0, keepdim=True) if combine == "max" else features.amin(dim=0, keepdim=True)


def last_for_all(count: int, places: Iterable[int]) -> list[int]:
    """The index, below `count`, for each place; the last one is used for all places beyond."""
    return [min(place, count - 1) for place in places]


def rgb_pixels(image: Tensor, name: str) -> Tensor:
    """[B, H, W, 1, 3 or 4] -> [B, 3, H, W]. Raises AdapterError for another shape and values outside 0..1."""
    check_shape(image, name)
    check_range(image, name, "an image")
    return image[..., :3].expand(*image.shape[:3], 3).movedim(-1, 1).float()


def check_shape(image: Tensor, name: str) -> None:
    """Raises AdapterError for an image that is not [B, H, W, 1, 3 or 4]."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise AdapterError(
            f"{name} has the shape {tuple(image.shape)}. Pass [batch, height, width, 3 channels] with at least one "
            "image and one pixel; 1 channel (grey) and 4 channels (alpha is ignored) work too."
        )


def _fit_mask(mask: Tensor, pixels: Tensor, size: int, crop: str) -> Tensor:
    """[H, W] or [M, H, W] -> [M, 1, H, W] at the image's size; the last mask is used for all remaining images."""
    mask = check_mask(mask)
    if len(mask) > len(pixels):
        raise AdapterError(
            f"There are {len(mask)} masks for {len(pixels)} image{'s' * (len(pixels) > 1)}. Connect one mask, or one "
            "for each image."
        )
    empty = ~mask.flatten(1).any(1)
    rows = last_for_all(len(mask), range(len(pixels)))
    mask = mask_pixels(mask, pixels)
    kept = mask if crop in ("pad", "stretch") else mask[(..., *_kept(mask, size, crop))]
    for image, row in enumerate(rows):
        if empty[row]:
            hidden = one_of("image", image, pixels) if len(mask) > 1 or len(pixels) == 1 else "every image"
            raise AdapterError(
                f"{one_of('mask', row, mask)} is 0 everywhere, so it hides all of {hidden} from the image encoder. "
                f"{EMPTY_MASK_ADVICE}"
            )
        if not kept[row].any():
            raise AdapterError(
                f"{one_of('mask', row, mask)} hides all that crop {crop!r} keeps of {one_of('image', image, pixels)} "
                "from the image encoder. Choose another crop, such as 'pad', or enlarge the mask."
            )
    return mask


def mask_pixels(mask: Tensor, pixels: Tensor) -> Tensor:
    """[M, H, W] of any size -> [M, 1, H, W] at the size of the pixels."""
    mask = mask[:, None].to(pixels)
    if mask.shape[-2:] == pixels.shape[-2:]:
        return mask
    return F.interpolate(mask, size=pixels.shape[-2:], mode="bilinear", align_corners=False)


def _kept(pixels: Tensor, size: int, crop: str) -> tuple[slice, slice]:
    """Rows and columns of [..., H, W] that the square of `crop` touches."""
    target = _scaled(pixels, size)
    scale = min(pixels.shape[-2:]) / size
    top, left = _corner(target, size, crop)
    spans = [(math.floor(start * scale), math.ceil((start + size) * scale)) for start in (top, left)]
    return slice(*spans[0]), slice(*spans[1])


def _resize(pixels: Tensor, target: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == target:
        return pixels
    return F.interpolate(pixels, size=target, mode="bicubic", antialias=True)


def _scaled(pixels: Tensor, size: int) -> tuple[int, int]:
    """(height, width) with the short side at `size`."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    return max(size, round(scale * height)), max(size, round(scale * width))


def _crop_to_square(pixels: Tensor, size: int, crop: str) -> Tensor:
    """Resize, then crop, as CLIP does. Of a long strip only the part around the square is resized: all of an image of
    8192 x 4 would be 458,752 x 224 pixels.
    """
    side = min(pixels.shape[-2:])
    target = list(_scaled(pixels, size))
    corner = list(_corner((target[0], target[1]), size, crop))
    for axis in (0, 1):
        length = pixels.shape[axis - 2]
        if length > _LONG * side:
            first = max(0, corner[axis] // size - _MARGIN)  # in squares, so that the part begins at a whole pixel
            last = first + 2 * _MARGIN + 2
            pixels = pixels.narrow(axis - 2, first * side, min(length, last * side) - first * side)
            target[axis] = min(target[axis], last * size) - first * size
            corner[axis] -= first * size
    top, left = corner
    return _resize(pixels, (target[0], target[1]))[..., top : top + size, left : left + size]


def _pad_to_square(pixels: Tensor, size: int, colour: Tensor) -> Tensor:
    """Pad, then resize. The long side needs no padding, so it is resized before: the canvas stays small."""
    height, width = pixels.shape[-2:]
    side = max(height, width)
    pixels = _resize(pixels, (size, width) if height >= width else (height, size))
    grid = (size, side) if height >= width else (side, size)
    canvas = colour.expand(len(pixels), 3, *grid).clone()
    top, left = (grid[0] - pixels.shape[-2]) // 2, (grid[1] - pixels.shape[-1]) // 2
    canvas[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
    return _resize(canvas, (size, size))


def _corner(grid: tuple[int, int], size: int, crop: str) -> tuple[int, int]:
    """Top and left of the square; a side that `crop` does not name is centred."""
    spare_height, spare_width = grid[0] - size, grid[1] - size
    top = {"top": 0, "bottom": spare_height}.get(crop, spare_height // 2)
    left = {"left": 0, "right": spare_width}.get(crop, spare_width // 2)
    return top, left
