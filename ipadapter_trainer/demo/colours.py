"""The colours of an emoji in words, for captions that say what an image shows and how."""

from __future__ import annotations

import torch
from torch import Tensor

from .closeness import WHITE, shares

COLOUR_NAMES = ("black", "grey", "white", "brown", "red", "orange", "yellow", "green", "blue", "purple", "pink")
HUES = ((15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (340, "pink"))
MOST, SMALLEST = 3, 0.1  # colours of an image, and the share of the ink that each has at least


def colour_words(pixels: Tensor) -> list[str]:
    """The most frequent colours of each image [B, 3, H, W] in [-1, 1], without its background: "red black"."""
    unit = (pixels.clamp(-1, 1) + 1) / 2
    most, order = shares(_named(unit), unit.amin(dim=1) < WHITE, len(COLOUR_NAMES)).topk(MOST)
    return [
        " ".join(COLOUR_NAMES[colour] for share, colour in zip(*row, strict=True) if share >= SMALLEST)
        for row in zip(most.tolist(), order.tolist(), strict=True)
    ]


def _named(unit: Tensor) -> Tensor:
    """int64 [B, H, W]: the name, in ``COLOUR_NAMES``, of each pixel [B, 3, H, W] in 0..1."""
    value, low = unit.amax(dim=1), unit.amin(dim=1)
    chroma = value - low
    red, green, blue = unit.unbind(1)
    divisor = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        ((green - blue) / divisor) % 6,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    name = COLOUR_NAMES.index
    edges = torch.tensor([float(edge) for edge, _ in HUES], device=unit.device)
    names = torch.tensor([name(colour) for _, colour in HUES] + [name("red")], device=unit.device)
    result = names[torch.bucketize(60 * hue, edges)]
    warm = (60 * hue < 50) | (60 * hue > 340)
    result = torch.where((result == name("red")) & (chroma < 0.45) & (value > 0.7), name("pink"), result)
    result = torch.where(warm & (value < 0.68), name("brown"), result)
    grey = torch.where(value > 0.78, name("white"), name("grey"))
    result = torch.where(chroma < 0.12, grey, result)
    return torch.where((value < 0.25) | ((value < 0.38) & (chroma < 0.15)), name("black"), result)
