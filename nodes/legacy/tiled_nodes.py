"""The old tiled nodes: up to four square tiles of the reference image, each acting in its part of the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from comfy_api.latest import io
from torch import Tensor

from . import fields as f
from .execute import OldPrompt, apply_old
from .old_images import center_crop, resize, resize_with_pil, sharpen
from .old_node import OldNode
from .wires import open_pipeline

_TILE = 256
_MOST = 4


class IPAdapterTiled(OldNode):
    TITLE = "IPAdapter Tiled"
    REPLACED_BY = "Image Prompt Regions, with a part of the image for each mask"
    FUNCTION = "apply_tiled"
    UNFOLD: ClassVar[bool] = False

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 3),
            f.weight_type(),
            *([] if cls.UNFOLD else [f.combine()]),
            *f.window(),
            f.number("sharpening", 0.0, 0.0, 1.0),
            f.scaling(),
            *([f.encode_batch_size()] if cls.UNFOLD else []),
            *f.negative_and_mask(),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [
            io.Model.Output(display_name="MODEL"),
            io.Image.Output(display_name="tiles"),
            io.Mask.Output(display_name="masks"),
        ]

    @classmethod
    def apply_tiled(
        cls,
        model: Any,
        ipadapter: Any,
        image: Tensor,
        weight: Any,
        weight_type: str,
        start_at: float,
        end_at: float,
        sharpening: float,
        combine_embeds: str = "concat",
        image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        embeds_scaling: str = "V only",
        encode_batch_size: int = 0,
    ) -> tuple[Any, ...]:
        pipeline = open_pipeline(ipadapter, clip_vision=clip_vision)
        tiles, masks = cut_tiles(image, attn_mask, sharpening)
        prompts = [
            OldPrompt(
                image=tile,
                image_negative=image_negative,
                weight=weight,
                weight_type=weight_type,
                combine_embeds=combine_embeds,
                start_at=start_at,
                end_at=end_at,
                attn_mask=mask,
                unfold=cls.UNFOLD,
                embeds_scaling=embeds_scaling,
                encode_batch_size=encode_batch_size,
            )
            for tile, mask in zip(tiles, masks, strict=True)
        ]
        return apply_old(model, pipeline, cls.TITLE, *prompts)[0], torch.cat(tiles), torch.cat(masks)


class IPAdapterTiledBatch(IPAdapterTiled):
    TITLE = "IPAdapter Tiled Batch"
    UNFOLD = True


def cut_tiles(image: Tensor, mask: Tensor | None, sharpening: float) -> tuple[list[Tensor], list[Tensor]]:
    """Images [B, H, W, 3] -> tiles [B, 256, 256, 3] and, for each, its mask [M, h, w] at the size of the whole.

    Nearly square images are cropped to a square of 2 x 2 tiles; of others the short side is one tile. Tiles overlap
    where they do not fill the side.
    """
    height, width = image.shape[1:3]
    mask = torch.ones(1, height, width, dtype=image.dtype) if mask is None else mask.reshape(-1, *mask.shape[-2:])
    # The mask takes the proportions of the reference image, which the result is expected to have.
    mask = resize(mask, (height, width))
    pixels = image.movedim(-1, 1)[:, :3]
    if 0.75 < height / width < 1.33:
        side = min(height, width)
        pixels, mask = center_crop(pixels, (side, side)), center_crop(mask, (side, side))
        size = (2 * _TILE, 2 * _TILE)
    elif height < width:
        size = (_TILE, int(_TILE * width / height))
    else:
        size = (int(_TILE * height / width), _TILE)
    pixels, mask = resize_with_pil(pixels, size, "LANCZOS"), resize(mask, size)
    if not 1 / _MOST <= height / width <= _MOST:
        strip = (_TILE, _MOST * _TILE) if height < width else (_MOST * _TILE, _TILE)
        pixels, mask = center_crop(pixels, strip), center_crop(mask, strip)
    whole = sharpen(pixels, sharpening).movedim(1, -1)
    tiles, masks = [], []
    for top in _starts(whole.shape[1]):
        for left in _starts(whole.shape[2]):
            window = (slice(None), slice(top, top + _TILE), slice(left, left + _TILE))
            part = torch.zeros(len(mask), *whole.shape[1:3], dtype=whole.dtype)
            part[window] = mask[window]
            tiles.append(whole[window])
            masks.append(part)
    return tiles, masks


def _starts(length: int) -> list[int]:
    """Where the tiles of a side begin."""
    count = math.ceil(length / _TILE)
    overlap = max(0.0, (count * _TILE - length) / max(1, count - 1))
    return [int(index * (_TILE - overlap)) for index in range(count)]


NODES = [IPAdapterTiled, IPAdapterTiledBatch]
