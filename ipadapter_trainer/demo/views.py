"""Views of an image: mirrored, shifted, recoloured. A few thousand images alone are soon known by heart.

Everything is drawn from a generator on the images' own device.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 16  # an image is so many margins wide: the white around a drawing, within which it can be shifted
LATENT = 8  # pixels a latent
PERMUTATIONS = tuple(itertools.permutations(range(3)))  # of the colour channels; the first leaves them as they are


def mirror(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images [B, 3, H, W]."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)


def shift(pixels: Tensor, generator: torch.Generator, step: int = 1) -> Tensor:
    """Shift each image over its white background by up to its margin each way, in multiples of ``step`` pixels.

    Steps of the whole margin keep pixel art on its grid.
    """
    height, width = pixels.shape[-2:]
    margin = width // GRID
    sides = 2 * margin // step + 1
    offsets = step * torch.randint(sides, (2, len(pixels)), generator=generator, device=pixels.device)
    padded = F.pad(pixels, (margin,) * 4, value=1.0).permute(0, 2, 3, 1)
    rows = torch.arange(height, device=pixels.device) + offsets[0, :, None]
    columns = torch.arange(width, device=pixels.device) + offsets[1, :, None]
    each = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def recolour(pixels: Tensor, permutation: int | Tensor) -> Tensor:
    """Exchange the colour channels: one of ``PERMUTATIONS`` for all images, or one each [B]. White stays white."""
    if isinstance(permutation, int):
        return pixels[:, list(PERMUTATIONS[permutation])]
    channels = _permutations(pixels.device)[permutation]
    return pixels.gather(1, channels[:, :, None, None].expand_as(pixels))


@cache
def _permutations(device: torch.device) -> Tensor:
    return torch.tensor(PERMUTATIONS, device=device)


def numbered_view(pixels: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """View 0 of images [B, 3, H, W] are they themselves, view 1 their mirror images; others are mirrored and shifted
    at random, by whole margins.
    """
    if number < 2:
        return pixels.flip(-1) if number else pixels
    return shift(mirror(pixels, generator), generator, pixels.shape[-1] // GRID)


def other_colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image recoloured."""
    drawn = torch.randint(1, len(PERMUTATIONS), (len(pixels),), generator=generator, device=pixels.device)
    return recolour(pixels, drawn)
