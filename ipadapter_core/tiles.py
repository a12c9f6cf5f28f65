"""Square tiles of an image, each of which is encoded at the encoder's full resolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import AdapterError
from .image_prompt import CLIP_MEAN, crop_image, last_for_all, mask_pixels, rgb_pixels
from .masks import check_mask

MOST_TILES = 64  # of one image

_UNCOVERED = 0.1  # of a tile: what may be left out along the long side before it takes one tile more

Box = tuple[int, int, int]  # top, left and side in pixels


def tile_boxes(height: int, width: int, tiles: int) -> list[Box]:
    """Squares that cover an image, evenly spread: `tiles` along its short side, as many along the long one as it needs.

    Raises AdapterError when that is a single square, which the whole image nearly is, or more than `MOST_TILES`.
    """
    short = min(height, width)
    side = max(1, round(short / tiles))
    tops, lefts = (_starts(length, side, math.ceil(tiles * length / short - _UNCOVERED)) for length in (height, width))
    count = len(tops) * len(lefts)
    if count == 1:
        raise AdapterError(
            f"tiles {tiles} cuts squares along the long side, and an image of {width} x {height} is one square. Set "
            "tiles to 2 or more, or to 0."
        )
    if count > MOST_TILES:
        raise AdapterError(
            f"tiles {tiles} cuts an image of {width} x {height} into {count} tiles; at most {MOST_TILES} are useful. "
            "Use fewer tiles, or crop the image."
        )
    return [(top, left, side) for top in tops for left in lefts]


def tile_image(
    image: Tensor,
    size: int,
    tiles: int,
    *,
    mask: Tensor | None = None,
    fill: tuple[float, float, float] = CLIP_MEAN,
    name: str = "image",
) -> Tensor:
    """The tiles of image [B, H, W, C] as input of the encoder, [B * tiles, size, size, 3], image by image.

    `mask` and `fill` as in `crop_image`; tiles where the mask is 0 are left out.

    Raises AdapterError as `crop_image` and `tile_boxes` do, and when the mask leaves no tile.
    """
    pixels = rgb_pixels(image, name)
    boxes = tile_boxes(pixels.shape[-2], pixels.shape[-1], tiles)
    masks = None if mask is None else mask_pixels(check_mask(mask), pixels)[:, 0]
    made: list[Tensor] = []
    for index, place in enumerate(last_for_all(1 if masks is None else len(masks), range(len(pixels)))):
        for top, left, side in boxes:
            rows, columns = slice(top, top + side), slice(left, left + side)
            seen = None if masks is None else masks[place, rows, columns]
            if seen is None or seen.any():
                part = image[index : index + 1, rows, columns]
                made.append(crop_image(part, size, "stretch", mask=seen, fill=fill, name=name))
    if not made:
        raise AdapterError(
            f"All {len(boxes)} tiles of {name} are hidden by the mask, which shows only what lies between them. Set "
            "tiles to 0, or grow the mask."
        )
    return torch.cat(made)


def _starts(length: int, side: int, count: int) -> list[int]:
    spare = max(0, length - side)
    return [spare // 2] if count <= 1 else [round(spare * place / (count - 1)) for place in range(count)]
