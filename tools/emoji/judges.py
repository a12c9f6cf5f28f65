"""Who judges the generated images: a classifier of styles, one of concepts, colour histograms, and the stack's CLIP.

The classifiers are trained on the training images alone and are no part of what generates; how often they are right
on real held-out images is reported beside every number they give.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from .concepts import CONCEPTS
from .loop import LossFunction, device_of, training_device
from .pictures import STYLE_NAMES, EmojiPictures, to_pixels
from .views import mirror, shift, zoom

WHITE = 0.94  # a pixel whose darkest channel is above is background
PALETTES = ((6, "ink"), (12, "ink"), (8, "outlines"), (8, "surfaces"))  # bins a channel, of which pixels
STEPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5)  # between pixels in [-1, 1]


class StyleClassifier(nn.Module):
    """A small network over ``style_features``: pixels [B, 3, H, W] in [-1, 1] -> logits [B, 5] over ``STYLE_NAMES``.

    It cannot see what is drawn, only which colours and edges there are: a convolutional network of this size learns the
    few thousand images by heart before it tells the styles of others as well.
    """

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        inputs = sum(bins**3 for bins, _ in PALETTES) + len(STEPS) + 1
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(inputs, hidden), nn.SiLU(), nn.Dropout(0.3), nn.Linear(hidden, len(STYLE_NAMES))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(style_features(pixels))


class ConceptClassifier(nn.Module):
    """A small convolutional network: pixels [B, 3, 128, 128] in [-1, 1] -> logits [B, C] over ``CONCEPTS``."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16 * widths[-1], len(CONCEPTS)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def style_features(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> [B, F], the square roots of shares of the ink.

    Palettes (joint RGB histograms of all ink, of outlines and of surfaces, see ``PALETTES``), and how steep the steps
    between neighbouring pixels are (``STEPS``): what flat, shaded and outlined drawing leave behind.
    """
    unit = (pixels.clamp(-1, 1) + 1) / 2
    ink = unit.amin(dim=1) < WHITE
    right = F.pad(pixels.diff(dim=-1).abs().amax(dim=1), (0, 1))
    below = F.pad(pixels.diff(dim=-2).abs().amax(dim=1), (0, 0, 0, 1))
    step = torch.maximum(right, below)
    where = {"ink": ink, "outlines": ink & (step > 0.25), "surfaces": ink & (step < 0.05)}
    shares = [_palette(unit, where[part], bins) for bins, part in PALETTES]
    kind = torch.bucketize(step, torch.tensor(STEPS, device=pixels.device))
    shares.append(_shares(kind, ink, len(STEPS) + 1))
    return torch.cat(shares, dim=-1).sqrt()


def style_losses(pictures: EmojiPictures, vae: AutoencoderKL, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on real images and on their round trips through the autoencoder, half each.

    The round trips keep the classifier from reading the autoencoder's softness, which every generated image has,
    as a style.
    """
    device = device_of(vae)
    real = to_pixels(pictures.images)
    chunks = (chunk.to(device) for chunk in (*real.split(64), *round_trip(vae, real).split(64)))
    features = torch.cat([style_features(chunk) for chunk in chunks])
    labels = pictures.style_ids.repeat(2).to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, StyleClassifier)
        rows = torch.randint(len(features), (batch_size,), generator=generator, device=device)
        return _cross_entropy(model.head(features[rows]), labels[rows])

    return losses


def concept_losses(pictures: EmojiPictures, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on shifted, zoomed, recoloured and softened images."""
    device = training_device()
    images = pictures.images.to(device)
    labels = concept_ids(pictures).to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def draw() -> Tensor:
            return torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)

        rows = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        pixels = zoom(shift(mirror(to_pixels(images[rows]), generator), generator), generator)
        soft = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")
        pixels = torch.lerp(pixels, soft, draw())  # the autoencoder's softness
        tint = 0.6 + 0.4 * torch.rand(batch_size, 3, 1, 1, generator=generator, device=device)
        return _cross_entropy(model((pixels - 1) * tint + 1), labels[rows])

    return losses


def _cross_entropy(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(logits.float(), truth), "accuracy": (logits.argmax(-1) == truth).float().mean()}


def concept_ids(pictures: EmojiPictures) -> Tensor:
    """int64 [N]: the index of each image's concept in ``CONCEPTS``."""
    index = {concept: number for number, concept in enumerate(CONCEPTS)}
    return torch.tensor([index[concept] for concept in pictures.concepts])


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the autoencoder gives them back, on the CPU."""
    chunks = (chunk.to(device_of(vae)) for chunk in pixels.split(64))
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample.cpu() for chunk in chunks]).clamp(-1, 1)


@torch.no_grad()
def judge(classifier: nn.Module, pixels: Tensor) -> Tensor:
    """Logits [N, classes] of a classifier, for pixels in [-1, 1]."""
    return torch.cat([classifier(chunk) for chunk in pixels.split(64)])


def choose_among(logits: Tensor, candidates: Tensor) -> Tensor:
    """int64 [N]: the candidate with the highest logit, as an index into each row of ``candidates`` [N, K]."""
    return logits.gather(1, candidates).argmax(-1)


def colour_histogram(pixels: Tensor, bins: int = 4) -> Tensor:
    """Joint RGB histogram [N, bins**3] of pixels in [-1, 1], each row summing to 1; the white background is left out.

    The background is the same in every image and would only dilute the distances.
    """
    unit = (pixels.clamp(-1, 1) + 1) / 2
    return _palette(unit, unit.amin(dim=1) < WHITE, bins)


def _palette(unit: Tensor, where: Tensor, bins: int) -> Tensor:
    """Joint RGB histogram [B, bins**3] of unit [B, 3, H, W] in 0..1, of the pixels ``where`` [B, H, W] is true."""
    index = (unit * bins).long().clamp(max=bins - 1)
    return _shares((index[:, 0] * bins + index[:, 1]) * bins + index[:, 2], where, bins**3)


def _shares(index: Tensor, where: Tensor, size: int) -> Tensor:
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
