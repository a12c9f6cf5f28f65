"""More views of an image than the demo's: zoomed, patched together, disguised.

Everything is drawn from a generator on the images' own device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ipadapter_trainer.demo.views import PERMUTATIONS, mirror, other_colours, recolour


def any_colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Recolour half of the images."""
    device = pixels.device
    changed = torch.rand(len(pixels), generator=generator, device=device) < 0.5
    drawn = torch.randint(len(PERMUTATIONS), (len(pixels),), generator=generator, device=device)
    return recolour(pixels, torch.where(changed, drawn, 0))


def other_tones(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image paler or darker, each channel by an amount of its own, and a quarter of the images recoloured.

    White and black stay. With five other orders of the channels alone, an adapter learns a concept's usual colours, not
    the image's.
    """
    others = other_colours(pixels, generator)
    pixels = torch.where(_draw(pixels, generator, 1, 1, 1) < 0.25, others, pixels)
    power = 0.6 * (2 * _draw(pixels, generator, 1, 1, 1) - 1) + 0.25 * (2 * _draw(pixels, generator, 3, 1, 1) - 1)
    ink = ((1 - pixels) / 2).clamp(0, 1)
    return 1 - 2 * ink ** power.exp()


def zoom(pixels: Tensor, generator: torch.Generator, smallest: float = 0.8) -> Tensor:
    """Show a window of ``smallest`` to 1.25 times each image's sides, near its centre; white outside."""
    count, device = len(pixels), pixels.device
    side = smallest + (1.25 - smallest) * torch.rand(count, 1, generator=generator, device=device)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = side[:, 0]
    room = (1 - side).clamp(min=0.1)
    theta[:, :, 2] = room * (2 * torch.rand(count, 2, generator=generator, device=device) - 1)
    return _transform(pixels, theta)


def warp(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Zoom each image by another factor in each direction, and turn it by up to 30 degrees; white outside."""
    count, device = len(pixels), pixels.device

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    angle, sides = draw(-0.52, 0.52), draw(0.75, 1.3, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    theta = torch.cat([turn * sides[:, None], draw(-0.12, 0.12, 2, 1)], dim=2)
    return _transform(pixels, theta)


def _transform(pixels: Tensor, theta: Tensor) -> Tensor:
    """Sample each image by its affine matrix [B, 2, 3]; white outside, which is 1."""
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def blend(pixels: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Each image, and another shining through (mixup, arXiv 1710.09412)."""
    share = 0.5 * torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device)
    return torch.lerp(pixels, others, share)


def patchwork(pixels: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """The left or right part of each image, and the rest from another (CutMix, arXiv 1905.04899)."""
    width, device = pixels.shape[-1], pixels.device
    edges = torch.randint(width // 4, 3 * width // 4, (len(pixels), 1, 1, 1), generator=generator, device=device)
    return torch.where(torch.arange(width, device=device) < edges, pixels, others)


def disguise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Warp, mirror, recolour, soften and tint images, so that the drawing stays and its pixels do not."""
    pixels = any_colours(warp(mirror(pixels, generator), generator), generator)
    pixels = _soften(pixels, _draw(pixels, generator, 1, 1, 1), cell=4)
    return _tint(pixels, generator, least=0.6)


def retouch(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, zoom, soften and tint some of the images, so that their style stays."""
    pixels = mirror(pixels, generator)
    pixels = torch.where(_draw(pixels, generator, 1, 1, 1) < 0.5, zoom(pixels, generator), pixels)
    pixels = _soften(pixels, 2 * (_draw(pixels, generator, 1, 1, 1) - 0.5).clamp(min=0), cell=2)
    return _tint(pixels, generator, least=0.8)


def _draw(pixels: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform numbers [B, *shape] in 0..1."""
    return torch.rand(len(pixels), *shape, generator=generator, device=pixels.device)


def _soften(pixels: Tensor, share: Tensor, cell: int) -> Tensor:
    """Mix each image with itself without what is smaller than ``cell`` pixels, as an autoencoder's images are."""
    soft = F.interpolate(F.avg_pool2d(pixels, cell), scale_factor=cell, mode="bilinear")
    return torch.lerp(pixels, soft, share)


def _tint(pixels: Tensor, generator: torch.Generator, least: float) -> Tensor:
    """Scale each colour channel's distance from white by ``least`` to 1."""
    return (pixels - 1) * (least + (1 - least) * _draw(pixels, generator, 3, 1, 1)) + 1
