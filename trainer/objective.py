"""What the adapter is trained to do: predict the noise, or the velocity, of a noisy latent."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .errors import BaseModelError

PREDICTION_TYPES = ("epsilon", "v_prediction")

Draw = TypeVar("Draw", float, Tensor)


def noisy_latents_and_target(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise the latents [B, 4, h, w] to their timesteps [B]; returns (noisy latents, what the UNet should
    say).

    The target is the noise (Ho et al., arXiv 2006.11239) or the velocity alpha * noise - sigma * latents
    (Salimans and Ho, arXiv 2202.00512), as the scheduler's `prediction_type` says.

    Raises BaseModelError for another prediction type.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noisy, noise
    if kind == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    raise BaseModelError(f"prediction type {kind!r} cannot be trained; expected one of {', '.join(PREDICTION_TYPES)}.")


def dropped(image_embeds: Tensor, drop_image_embeds: Tensor) -> Tensor:
    """Zero the embeddings [B, E] of the rows that `drop_image_embeds` [B] marks (paper, section 3.2.3)."""
    return torch.where(drop_image_embeds.bool()[:, None], torch.zeros_like(image_embeds), image_embeds)


def dropout(
    draw: Draw, *, image: float = 0.05, text: float = 0.05, both: float = 0.05
) -> tuple[bool | Tensor, bool | Tensor]:
    """One uniform draw in [0, 1), or a tensor of them, decides: (drop the image, drop the text).

    The order of the original: [0, image) image, then text, then both, the rest keeps both.
    """
    end = image + text
    in_both = (draw >= end) & (draw < end + both)
    return (draw < image) | in_both, ((draw >= image) & (draw < end)) | in_both
