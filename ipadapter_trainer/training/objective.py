"""The training target, noise or velocity, and the weight of each timestep in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional as F

from ..errors import BaseModelError, ConfigError
from ..models.model_folder import PREDICTION_TYPES


@dataclass(frozen=True, eq=False)
class Objective:
    """The target of the scheduler's prediction type, and the weight of each timestep.

    `min_snr_gamma` weighs rows by min(SNR, gamma) / SNR, or / (SNR + 1) for the v target (Hang et al.,
    arXiv 2303.09556, section 3.4); None weighs them alike, as the paper does.
    """

    scheduler: DDPMScheduler
    min_snr_gamma: float | None = None

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return str(self.scheduler.config["prediction_type"])

    def sample_losses(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """The mean squared errors [B] of predictions [B, C, h, w], weighed by their timesteps [B]; in float32."""
        losses = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))
        if self.min_snr_gamma is None:
            return losses
        snr = compute_snr(self.scheduler, timesteps)
        divisor = snr + 1 if self.prediction_type == "v_prediction" else snr
        return losses * (snr.clamp(max=self.min_snr_gamma) / divisor)


def new_objective(
    scheduler: DDPMScheduler,
    *,
    prediction_type: str | None = None,
    min_snr_gamma: float | None = None,
    zero_terminal_snr: bool = False,
) -> Objective:
    """The objective of a base model's scheduler; `zero_terminal_snr` rescales its noise schedule so that the last
    timestep is pure noise (Lin et al., arXiv 2305.08891, algorithm 1).

    Raises ConfigError when `prediction_type` is not the scheduler's, or when the last timestep is pure noise and the
    target is the noise itself.
    """
    found = str(scheduler.config["prediction_type"])
    if prediction_type is not None and prediction_type != found:
        raise ConfigError(
            f"prediction_type is {prediction_type!r}, but the base model's scheduler has {found!r}. Leave it "
            "out, or correct scheduler/scheduler_config.json."
        )
    if zero_terminal_snr and not scheduler.config.get("rescale_betas_zero_snr"):
        rescaled: Any = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
        scheduler = rescaled
    if found == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "The noise schedule ends in pure noise (zero_terminal_snr), and the base model predicts epsilon: at the "
            "last timestep there is nothing to learn. Use a v-prediction base, or set zero_terminal_snr=false."
        )
    return Objective(scheduler, min_snr_gamma)


def noisy_latents_and_target(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise the latents [B, 4, h, w] to their timesteps [B]; returns (noisy latents, target of the
    UNet).

    The target is the noise (Ho et al., arXiv 2006.11239) or the velocity alpha * noise - sigma * latents
    (Salimans and Ho, arXiv 2202.00512), by the scheduler's `prediction_type`.

    Raises BaseModelError for another prediction type.
    """
    steps: Any = timesteps  # typed IntTensor in diffusers
    noisy = scheduler.add_noise(latents, noise, steps)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noisy, noise
    if kind == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, steps)
    raise BaseModelError(f"prediction type {kind!r} cannot be trained; expected one of {', '.join(PREDICTION_TYPES)}.")


def dropped(
    image_features: Sequence[Tensor], no_image: Sequence[Tensor], drop_image_embeds: Tensor
) -> tuple[Tensor, ...]:
    """Features [B, ...] with the rows that `drop_image_embeds` [B] marks replaced by those of no image [1, ...]
    (paper, section 3.2.3; `image_features.dropped_features`).
    """
    rows = drop_image_embeds.bool()
    return tuple(
        torch.where(rows.view(-1, *(1,) * (given.ndim - 1)), none.to(given), given)
        for given, none in zip(image_features, no_image, strict=True)
    )
