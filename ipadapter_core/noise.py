"""Noise for the negative image: what a result should not look like."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError

Noise = Literal["fade", "dissolve", "gaussian", "shuffle"]
NOISES: tuple[Noise, ...] = get_args(Noise)

_DISPLACEMENT, _SMOOTHNESS = 75.0, 3.5  # of "shuffle": its displacements, and the sigma of their blur at strength 0


def noise_image(image: Tensor, noise: str, strength: float, blur: int, generator: torch.Generator) -> Tensor:
    """image [B, H, W, 3] in 0..1 -> the same with noise. It takes no random number but the generator's.

    fade: a mixture with noise. dissolve: a share of the values becomes noise. gaussian: noise is added. shuffle: the
    image is turned upside down and torn, and noise brightens it. `strength` is from 0 to 1. `blur` is the width in
    pixels of the Gaussian that the result is blurred with, made odd; 0 is off.

    Raises AdapterError for an unknown kind of noise, and for an image that is too small for a blur.
    """
    if noise == "fade":
        noisy = image * (1 - strength) + _uniform(image, generator) * strength
    elif noise == "dissolve":
        taken = (_uniform(image, generator) < strength).to(image.dtype)
        noisy = image * (1 - taken) + _uniform(image, generator) * taken
    elif noise == "gaussian":
        noisy = image + _normal(image, generator) * strength
    elif noise == "shuffle":
        torn = _tear(image.movedim(-1, 1), (1 - strength) * _SMOOTHNESS, generator)
        # Both flips are certain; their draws keep the numbers that follow those of torchvision's transforms.
        torch.rand(2, generator=generator, device=image.device)
        image = torn.flip(-2).flip(-1).movedim(1, -1)
        grain = _normal(image, generator) * (strength * 0.75)
        noisy = image * (1 - grain) + grain
    else:
        raise AdapterError(f"Unknown noise {noise!r}. Use one of: {', '.join(NOISES)}.")
    noisy = noisy.clamp(0.0, 1.0)
    if blur <= 0:
        return noisy
    width = blur + 1 - blur % 2
    return gaussian_blur(noisy.movedim(-1, 1), width, 0.15 * width + 0.35).movedim(1, -1)


def gaussian_blur(image: Tensor, width: int, sigma: float) -> Tensor:
    """Blur [B, C, H, W] with a Gaussian of `width` pixels, an odd number; the image is mirrored at its borders.

    Raises AdapterError for an image of less than half that width.
    """
    half = (width - 1) // 2
    if min(image.shape[-2:]) <= half:
        raise AdapterError(
            f"The image has {image.shape[-1]} x {image.shape[-2]} pixels; a blur over {width} pixels needs at least "
            f"{half + 1} x {half + 1}. Use a larger image."
        )
    places = torch.linspace(-half, half, width, dtype=image.dtype, device=image.device)
    curve = torch.exp(-0.5 * (places / sigma) ** 2)
    curve = curve / curve.sum()
    channels = image.shape[1]
    kernel = torch.outer(curve, curve).expand(channels, 1, width, width)
    return F.conv2d(F.pad(image, (half, half, half, half), mode="reflect"), kernel, groups=channels)


def _tear(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Elastic deformation of [B, C, H, W]: every pixel comes from a place displaced at random, by displacements that a
    blur of `sigma` makes smooth. What comes from outside is black.
    """
    height, width = image.shape[-2:]
    kernel = int(8 * sigma + 1) // 2 * 2 + 1
    displaced: list[Tensor] = []
    for length in (width, height):
        offsets = torch.rand(1, 1, height, width, generator=generator, device=image.device) * 2 - 1
        if sigma > 0:
            offsets = gaussian_blur(offsets, kernel, sigma)
        displaced.append(offsets * _DISPLACEMENT / length)
    # grid_sample counts from -1 to 1 between the outer edges of the first and the last pixel.
    columns, rows = (torch.linspace((1 - n) / n, (n - 1) / n, n, device=image.device) for n in (width, height))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1) + torch.cat(displaced, 1).movedim(1, -1)
    inside = torch.ones_like(image[:, :1])
    sampled = F.grid_sample(
        torch.cat([image, inside], dim=1), grid.to(image.dtype).expand(len(image), -1, -1, -1), align_corners=False
    )
    return sampled[:, :-1] * sampled[:, -1:]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like).uniform_(generator=generator)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)
