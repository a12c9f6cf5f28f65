"""Attention maps: the image prompt's share of the attention, drawn over an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError
from .image_prompt import rgb_pixels

# From none to most: black, violet, red, orange, pale yellow. Brightness grows all the way, for the colour-blind too.
_COLOURS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64))


def image_share(image: Tensor, text: Tensor) -> Tensor:
    """The share of the image prompt in the attention, 0..1, from the magnitudes of both, in the same shape."""
    return image / (image + text).clamp_min(torch.finfo(image.dtype).tiny)


def colour_heat(heat: Tensor) -> Tensor:
    """[B, H, W] in 0..1 -> [B, H, W, 3]."""
    colours = torch.tensor(_COLOURS, dtype=heat.dtype, device=heat.device)
    at = heat.clamp(0.0, 1.0) * (len(_COLOURS) - 1)
    before = at.long().clamp_max(len(_COLOURS) - 2)
    return torch.lerp(colours[before], colours[before + 1], (at - before)[..., None])


def draw_heat(image: Tensor, heat: Tensor, opacity: float = 0.6, *, relative: bool = False) -> tuple[Tensor, Tensor]:
    """Heat [B, h, w] in 0..1 over images [B, H, W, C]. Returns the images and the heat in their size, [B, H, W].
    `relative` stretches the heat of all images, so that the least of it is 0 and the most 1.

    Raises AdapterError when their numbers differ, or as `rgb_pixels` does.
    """
    pixels = rgb_pixels(image, "image").movedim(1, -1)
    if len(image) != len(heat):
        raise AdapterError(
            f"There are {len(image)} images and attention maps of {len(heat)}. Connect the images that the recorded "
            "run made, all of them."
        )
    large = F.interpolate(heat[:, None], size=image.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    if relative:
        low, high = torch.aminmax(large)
        large = (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)
    drawn = torch.lerp(pixels.to(large), colour_heat(large), opacity)
    return drawn, large
