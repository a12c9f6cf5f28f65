"""Training of the style classifier."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import EmojiImages, to_pixels
from ipadapter_trainer.demo.judges import StyleClassifier, style_features

from .loop import LossFunction, device_of


def classifier_losses(images: EmojiImages, vae: AutoencoderKL, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on real images and on their round trips through the autoencoder, half each.

    The round trips keep the classifier from reading the autoencoder's softness, which every generated image has,
    as a style.
    """
    real = to_pixels(images.images)
    features = torch.cat([style_features(chunk) for chunk in (*real.split(256), *round_trip(vae, real).split(256))])
    labels = images.style_ids.repeat(2)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, StyleClassifier)
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        truth = labels[rows].to(device_of(model))
        logits = model.head(features[rows].to(truth.device))
        accuracy = (logits.argmax(-1) == truth).float().mean()
        return {"loss": F.cross_entropy(logits, truth), "accuracy": accuracy}

    return losses


@torch.no_grad()
def round_trip(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the autoencoder gives them back, on the CPU."""
    chunks = (chunk.to(device_of(vae)) for chunk in pixels.split(64))
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample.cpu() for chunk in chunks]).clamp(-1, 1)
