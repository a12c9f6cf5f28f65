"""How close a generated image is to its own image prompt: by its colours, and to the image encoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.base_model import BaseModel
from ..models.image_features import encode_clip_images
from .emoji import EmojiImages, normalize

WHITE = 0.94  # a pixel whose darkest channel is above is background


def closeness(base_model: BaseModel, generated: Tensor, references: Tensor) -> dict[str, float]:
    """Probability that a generated image is closer to its own reference than to a random other one."""
    histograms = histogram_similarity(colour_histogram(generated), colour_histogram(references))
    embeds = image_embeds(base_model, generated) @ image_embeds(base_model, references).T
    return {"closer_by_histogram": closer_to_own(histograms.cpu()), "closer_by_clip": closer_to_own(embeds.cpu())}


def choose_references(images: EmojiImages, count: int, seed: int = 0) -> list[int]:
    """Rows of distinct concepts in a seeded order, each in a seeded one of its styles."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, int] = {}
    for row in torch.randperm(len(images), generator=generator).tolist():
        chosen.setdefault(images.concepts[row], row)
    return list(chosen.values())[:count]


@torch.no_grad()
def image_embeds(base_model: BaseModel, pixels: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] -> unit CLIP embeddings [N, D]."""
    return F.normalize(encode_clip_images(base_model, normalize(pixels)), dim=-1)


def colour_histogram(pixels: Tensor, bins: int = 4) -> Tensor:
    """Joint RGB histogram [N, bins**3] of pixels in [-1, 1], each row summing to 1; the white background is left out.

    The background is the same in every image and would only dilute the distances.
    """
    unit = (pixels.clamp(-1, 1) + 1) / 2
    red, green, blue = (unit * bins).long().clamp(max=bins - 1).unbind(1)
    return shares((red * bins + green) * bins + blue, unit.amin(dim=1) < WHITE, bins**3)


def shares(index: Tensor, where: Tensor, size: int) -> Tensor:
    """Share of each of ``size`` indices among the places of index [B, H, W] where ``where`` is true: [B, size]."""
    counts = torch.zeros(len(index), size, device=index.device)
    counts.scatter_add_(1, index.flatten(1), where.flatten(1).float())
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)


def histogram_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Histogram intersection in [0, 1] of every row of a [N, K] with every row of b [M, K]: [N, M]."""
    return torch.minimum(a[:, None], b[None]).sum(-1)


def closer_to_own(similarity: Tensor) -> float:
    """Share of (own, other) pairs in which row i is more similar to column i than to another column; a tie counts half.

    ``similarity`` [N, N]: row = generated image, column = reference. The mean over all others is the probability that
    a random other one loses; 0.5 is chance.
    """
    own = similarity.diagonal()[:, None]
    wins = (own > similarity).float() + 0.5 * (own == similarity).float()
    others = ~torch.eye(len(similarity), dtype=torch.bool)
    return wins[others].mean().item()
