"""Who judges the generated images: a classifier of styles, one of concepts, colour histograms, and the stack's CLIP.

The classifiers are trained on the training images alone and are no part of what generates; how often they are right
on real held-out images is reported beside every number they give.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import to_pixels
from ipadapter_trainer.demo.judges import StyleClassifier, style_features

from ..shipped_emoji.judges import round_trip
from ..shipped_emoji.loop import device_of, training_device
from .concepts import CONCEPTS
from .images import EmojiImages
from .loop import LossFunction
from .views import any_colours, mirror, shift, zoom

PALETTES = ((6, "ink"), (12, "ink"), (8, "outlines"), (8, "surfaces"))  # bins a channel, of which pixels


new_style_classifier = partial(StyleClassifier, palettes=PALETTES)


class ConceptClassifier(nn.Module):
    """A small convolutional network: pixels [B, 3, H, W] in [-1, 1] -> logits [B, C] over ``CONCEPTS``."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(64)]
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16 * widths[-1], len(CONCEPTS)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def style_losses(images: EmojiImages, vae: AutoencoderKL, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on real images and on their round trips through the autoencoder, half each.

    The round trips keep the classifier from reading the autoencoder's softness, which every generated image has,
    as a style.
    """
    device = device_of(vae)
    real = to_pixels(images.images)
    chunks = (chunk.to(device) for chunk in (*real.split(64), *round_trip(vae, real).split(64)))
    features = torch.cat([style_features(chunk, PALETTES) for chunk in chunks])
    labels = images.style_ids.repeat(2).to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, StyleClassifier)
        rows = torch.randint(len(features), (batch_size,), generator=generator, device=device)
        return _cross_entropy(model.head(features[rows]), labels[rows])

    return losses


def concept_losses(images: EmojiImages, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on shifted, zoomed, recoloured and softened images."""
    device = training_device()
    uint8_images = images.images.to(device)
    labels = concept_ids(images).to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def draw() -> Tensor:
            return torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)

        rows = torch.randint(len(uint8_images), (batch_size,), generator=generator, device=device)
        pixels = zoom(shift(mirror(to_pixels(uint8_images[rows]), generator), generator), generator)
        pixels = any_colours(pixels, generator)
        soft = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")
        pixels = torch.lerp(pixels, soft, draw())  # the autoencoder's softness
        tint = 0.6 + 0.4 * torch.rand(batch_size, 3, 1, 1, generator=generator, device=device)
        return _cross_entropy(model((pixels - 1) * tint + 1), labels[rows])

    return losses


def _cross_entropy(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(logits.float(), truth), "accuracy": (logits.argmax(-1) == truth).float().mean()}


def concept_ids(images: EmojiImages) -> Tensor:
    """int64 [N]: the index of each image's concept in ``CONCEPTS``."""
    index = {concept: number for number, concept in enumerate(CONCEPTS)}
    return torch.tensor([index[concept] for concept in images.concepts])


@torch.no_grad()
def judge(classifier: nn.Module, pixels: Tensor) -> Tensor:
    """Logits [N, classes] of a classifier, for pixels in [-1, 1]."""
    return torch.cat([classifier(chunk) for chunk in pixels.split(64)])


def choose_among(logits: Tensor, candidates: Tensor) -> Tensor:
    """int64 [N]: the candidate with the highest logit, as an index into each row of ``candidates`` [N, K]."""
    return logits.gather(1, candidates).argmax(-1)
