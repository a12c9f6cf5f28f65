"""Images -> features before the projector, with the numbers of the old pack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...ipadapter_core import AdapterError
from ...ipadapter_core.encoders import encoder_advice
from ..features import TRAINED, negative_features, sound_features
from .old_images import center_crop, resize
from .setting import is_corrected
from .wires import Pipeline

_SIDE = 224
_MOST_TILES = 16
_preprocess = getattr(comfy.clip_model, "clip_preprocess", None) or comfy.clip_vision.clip_preprocess


def image_features(
    pipeline: Pipeline,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    batch_size: int = 0,
    tiles: int = 1,
    ratio: float = 1.0,
) -> Tensor:
    """Images [N, H, W, C] -> features [N, ...] that the adapter takes. `mask` [M, side, side] multiplies the pixels
    after normalisation. `batch_size`: images at a time, 0 for all.

    With `tiles` a side, the features of the tiles are stitched together, pooled to the size of one and added behind
    those of a single image (which count `ratio`), or mixed into those of several.
    """
    tiles = min(tiles, _MOST_TILES)
    height, width = images.shape[1:3]
    if min(height, width) < tiles:
        raise AdapterError(
            f"An image of {height} x {width} pixels cannot be cut into {tiles} x {tiles} tiles. Use a larger image, or "
            "fewer enhance_tiles."
        )
    whole = _encode(pipeline, images, mask, batch_size)
    if tiles <= 1:
        return whole
    parts = torch.cat([_encode(pipeline, _split(image, tiles), None, batch_size) for image in images])
    merge = _merge_tokens if whole.ndim == 3 else _merge_vectors
    merged = torch.cat([merge(part, tiles) for part in parts.split(tiles * tiles)])
    if len(whole) > 1:
        return whole * ratio + merged * (1 - ratio)
    return torch.cat([whole * ratio, merged])


def encode_with_mask(pipeline: Pipeline, images: Tensor, mask: Tensor | None) -> Tensor:
    """For IPAdapter Encoder: the mask is cropped to a square as the image is."""
    if mask is not None:
        side = _side(pipeline)
        mask = mask.reshape(-1, *mask.shape[-2:])
        if mask.shape[-2:] != (side, side):
            shortest = min(mask.shape[-2:])
            mask = resize(center_crop(mask, (shortest, shortest)), (side, side))
        if len(mask) not in (1, len(images)):
            raise AdapterError(
                f"There are {len(mask)} masks for {len(images)} images. Connect one mask, or one for each image."
            )
    return image_features(pipeline, images, mask=mask)


def unconditional(pipeline: Pipeline, positive: Tensor, negative: Tensor | None = None, batch_size: int = 0) -> Tensor:
    """The features of the negative branch, without connected `negative` images those of a black image, or zeros for
    adapters that take image_embeds. With the setting "corrected", those of the adapter's training.
    """
    if pipeline.adapter.spec.kind == "base" and negative is None:
        return torch.zeros_like(positive)
    if negative is not None:
        return image_features(pipeline, negative, batch_size=batch_size)
    if is_corrected():
        made = negative_features(pipeline.adapter, _encoder(pipeline), TRAINED)
        return torch.zeros_like(positive) if made is None else made
    side = _side(pipeline)
    return image_features(pipeline, torch.zeros(1, side, side, 3))


def _encoder(pipeline: Pipeline) -> Any:
    if pipeline.clip_vision is None:
        spec = pipeline.adapter.spec
        raise AdapterError(
            f"{pipeline.adapter.name} needs an image encoder. Connect clip_vision, or a unified loader. "
            f"{encoder_advice(spec)}"
        )
    return pipeline.clip_vision


def _side(pipeline: Pipeline) -> int:
    return getattr(_encoder(pipeline), "image_size", _SIDE)


def _encode(pipeline: Pipeline, images: Tensor, mask: Tensor | None, batch_size: int) -> Tensor:
    encoder = _encoder(pipeline)
    comfy.model_management.load_models_gpu([encoder.patcher])
    device = comfy.model_management.intermediate_device()
    is_base = pipeline.adapter.spec.kind == "base"
    made: list[Tensor] = []
    for part in images.split(batch_size or len(images)):
        pixels = _normalise(encoder, part.to(encoder.load_device))
        if mask is not None:
            pixels = pixels * mask[:, None].to(pixels)
        _, hidden, embeds, *_ = encoder.model(pixel_values=pixels, intermediate_output=-2)
        made.append((embeds if is_base else hidden).to(device))
    return sound_features(pipeline.adapter, torch.cat(made))


def _normalise(encoder: Any, images: Tensor) -> Tensor:
    options = {name: getattr(encoder, f"image_{name}", None) for name in ("mean", "std")}
    return _preprocess(
        images, size=getattr(encoder, "image_size", _SIDE), **{name: value for name, value in options.items() if value}
    ).float()


def _split(image: Tensor, tiles: int) -> Tensor:
    """[H, W, C] -> [tiles * tiles, H / tiles, W / tiles, C], row by row."""
    height, width = image.shape[0] // tiles, image.shape[1] // tiles
    corners = [(y * height, x * width) for y in range(tiles) for x in range(tiles)]
    return torch.stack([image[y : y + height, x : x + width] for y, x in corners])


def _merge_tokens(parts: Tensor, tiles: int) -> Tensor:
    """Hidden states of one image's tiles [tiles * tiles, 1 + grid * grid, E] -> [1, 1 + grid * grid, E]."""
    grid = math.isqrt(parts.shape[1] - 1)
    patches = parts[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)
    pooled = _pool(patches, tiles).flatten(2).transpose(1, 2)
    return torch.cat([parts[:, :1].mean(dim=0, keepdim=True), pooled], dim=1)


def _merge_vectors(parts: Tensor, tiles: int) -> Tensor:
    """image_embeds of one image's tiles [tiles * tiles, E] -> [1, E]. The old pack lays a vector out as a square of
    numbers, which needs a square E; elsewhere the mean is used.
    """
    side = math.isqrt(parts.shape[-1])
    if side * side != parts.shape[-1]:
        return parts.mean(dim=0, keepdim=True)
    return _pool(parts.unflatten(-1, (1, side, side)), tiles).flatten(1)


def _pool(parts: Tensor, tiles: int) -> Tensor:
    """Grids [tiles * tiles, C, grid, grid] side by side, pooled to the size of one: [1, C, grid, grid]."""
    grid: Sequence[int] = parts.shape[-2:]
    rows = [torch.cat(list(row), dim=-1) for row in parts.split(tiles)]
    return F.adaptive_avg_pool2d(torch.cat(rows, dim=-2)[None], (grid[0], grid[1]))
