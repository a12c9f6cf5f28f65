"""Who judges the generated pictures: a style classifier, colour histograms, and the stack's own CLIP.

The classifier is trained on the training pictures alone and is no part of what generates; its accuracy on real held-out
pictures is reported beside every number it gives.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from .clip import patchwork, zoom
from .loop import LossFunction, device_of
from .pictures import STYLE_NAMES, EmojiPictures, pick, to_pixels
from .vae import augment


class StyleClassifier(nn.Module):
    """A small convolutional network: pixels [B, 3, 64, 64] in [-1, 1] -> logits [B, 5] over ``STYLE_NAMES``.

    The mean of every stage reaches the output: a style is a palette (the first stage) as much as a way to shade and to
    outline (the later ones). Norms are over all channels, since narrower ones would take the colours away.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 64, 96)) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=1 if index == 0 else 2, padding=1),
                nn.GroupNorm(1, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 1) if index == 0 else nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(1, width),
                nn.SiLU(),
            )
            for index, (before, width) in enumerate(zip((3, *widths), widths, strict=False))
        )
        self.head = nn.Sequential(nn.Linear(sum(widths), 128), nn.SiLU(), nn.Linear(128, len(STYLE_NAMES)))

    def forward(self, pixels: Tensor) -> Tensor:
        means: list[Tensor] = []
        for stage in self.stages:
            pixels = stage(pixels)
            means.append(pixels.mean(dim=(-1, -2)))
        return self.head(torch.cat(means, dim=-1))


def classifier_losses(pictures: EmojiPictures, vae: AutoencoderKL, batch_size: int = 64) -> LossFunction:
    """Cross-entropy on real pictures and on their round trips through the autoencoder, half each, whole and in parts.

    The round trips keep the classifier from reading the autoencoder's softness, which every generated picture has,
    as a style; patchworks of two pictures of a style keep it from reading what is drawn.
    """
    real = to_pixels(pictures.images)
    soft = round_trip(vae, real)
    labels = pictures.style_ids
    same_style = [(labels == style).nonzero().flatten() for style in range(len(STYLE_NAMES))]

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        half = batch_size // 2
        rows = torch.randint(len(pictures), (half,), generator=generator)
        others = torch.stack([pick(same_style[style], generator) for style in labels[rows].tolist()])
        views = []
        for source in (real, soft):
            whole = zoom(augment(source[rows], generator), generator)
            mixed = patchwork(whole, augment(source[others], generator), generator)
            parts = torch.rand(half, 1, 1, 1, generator=generator) < 0.5
            views.append(torch.where(parts, mixed, whole))
        truth = labels[rows].repeat(2).to(device_of(model))
        logits = model(torch.cat(views).to(truth.device))
        accuracy = (logits.argmax(-1) == truth).float().mean()
        return {"loss": F.cross_entropy(logits, truth), "accuracy": accuracy}

    return losses


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the autoencoder gives them back."""
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in pixels.split(64)]).clamp(-1, 1)


@torch.no_grad()
def judge_styles(classifier: StyleClassifier, pixels: Tensor) -> Tensor:
    """int64 [N]: the style of each picture, pixels in [-1, 1]."""
    return torch.cat([classifier(chunk).argmax(-1) for chunk in pixels.split(64)])


def colour_histogram(pixels: Tensor, bins: int = 4) -> Tensor:
    """Joint RGB histogram [N, bins**3] of pixels in [-1, 1], each row summing to 1; the white background is left out.

    The background is the same in every picture and would only dilute the distances.
    """
    unit = ((pixels.clamp(-1, 1) + 1) / 2).flatten(2)
    index = (unit * bins).long().clamp(max=bins - 1)
    index = (index[:, 0] * bins + index[:, 1]) * bins + index[:, 2]
    ink = (unit.amin(dim=1) < 0.94).float()
    counts = torch.zeros(len(pixels), bins**3).scatter_add_(1, index, ink)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)


def histogram_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Histogram intersection in [0, 1] of every row of a [N, K] with every row of b [M, K]: [N, M]."""
    return torch.minimum(a[:, None], b[None]).sum(-1)


def closer_to_own(similarity: Tensor) -> float:
    """Share of (own, other) pairs in which row i is more similar to column i than to another column; a tie counts half.

    ``similarity`` [N, N]: row = generated picture, column = reference. The mean over all others is the probability that
    a random other one loses; 0.5 is chance.
    """
    own = similarity.diagonal()[:, None]
    wins = (own > similarity).float() + 0.5 * (own == similarity).float()
    others = ~torch.eye(len(similarity), dtype=torch.bool)
    return wins[others].mean().item()
