"""The old nodes that make and prepare images: noise for the negative, and the crop for the image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ...ipadapter_core.noise import noise_image
from . import fields as f
from .old_images import center_crop, resize, resize_with_pil, sharpen
from .old_node import OldNode

_SIDE = 224


class IPAdapterNoise(OldNode):
    TITLE = "IPAdapter Noise"
    REPLACED_BY = "Noise Image"
    FUNCTION = "make_noise"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.choice("type", ["fade", "dissolve", "gaussian", "shuffle"]),
            f.number("strength", 1.0, 0, 1),
            f.whole("blur", 0, 0, 32, 1),
            f.image("image_optional", optional=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Image.Output()]

    @classmethod
    def make_noise(cls, type: str, strength: float, blur: int, image_optional: Tensor | None = None) -> tuple[Tensor]:
        image = torch.zeros(1, _SIDE, _SIDE, 3) if image_optional is None else image_optional.cpu()
        side = min(image.shape[1:3])
        if image_optional is not None:
            image = resize(center_crop(image.movedim(-1, 1), (side, side)), (_SIDE, _SIDE)).movedim(1, -1)
        # The same images have the same noise: they are the seed.
        seed = int(image.sum().item()) % 1000000007
        return (noise_image(image, type, strength, blur, torch.Generator().manual_seed(seed)),)


class PrepImageForClipVision(OldNode):
    TITLE = "Prep Image For ClipVision"
    REPLACED_BY = "crop of Encode Image Prompt"
    FUNCTION = "prep_image"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.image("image"),
            f.choice("interpolation", ["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"]),
            f.choice("crop_position", ["top", "bottom", "left", "right", "center", "pad"]),
            f.number("sharpening", 0.0, 0, 1),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Image.Output()]

    @classmethod
    def prep_image(
        cls, image: Tensor, interpolation: str = "LANCZOS", crop_position: str = "center", sharpening: float = 0.0
    ) -> tuple[Tensor]:
        pixels = image.movedim(-1, 1)
        height, width = pixels.shape[-2:]
        if crop_position == "pad":
            across, down = max(0, height - width) // 2, max(0, width - height) // 2
            pixels = F.pad(pixels, (across, across, down, down))
        else:
            side = min(height, width)
            top = {"top": 0, "bottom": height - side}.get(crop_position, (height - side) // 2)
            left = {"left": 0, "right": width - side}.get(crop_position, (width - side) // 2)
            pixels = pixels[..., top : top + side, left : left + side]
        resized = resize_with_pil(pixels, (_SIDE, _SIDE), interpolation)
        return (sharpen(resized, sharpening).movedim(1, -1),)


NODES = [IPAdapterNoise, PrepImageForClipVision]
