"""TODO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from ipadapter_core import (
    AdapterApplication,
    IPAdapter,
    inject,
)

from ..models.base_model import BaseModel
from ..models.conditioning import added_conditions
from ..models.features import Features
from ..models.image_features import dropped_features
from .objective import Objective, dropped, noisy_latents_and_target


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """B examples, and the draws that make a training step of them."""

    features: Features
    drop_image_embeds: Tensor  # [B], true or 1 for the rows whose image is dropped
    noise: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # int64 [B]


@dataclass(frozen=True, eq=False)
class AdaptedUNet:
    """The frozen UNet with the adapter in it; made by `adapt_unet`. `no_image` are the features of a dropped image."""

    base_model: BaseModel
    adapter: Any  # IPAdapter, or Accelerate's wrapper of one
    application: AdapterApplication
    objective: Objective
    no_image: tuple[Tensor, ...]

    def loss(self, batch: TrainBatch) -> Tensor:
        """The mean of `sample_losses`."""
        return self.sample_losses(batch).mean()

    def sample_losses(self, batch: TrainBatch, image_features: Sequence[Tensor] | None = None) -> Tensor:
        """The error [B] of the UNet's predictions; gradients reach the adapter only. `image_features` replaces the
        batch's own.
        """
        receive, features = self.base_model.to_device, batch.features
        timesteps = receive(batch.timesteps)
        latents, noise = receive(features.latents), receive(batch.noise)
        noisy, target = noisy_latents_and_target(self.objective.scheduler, latents, noise, timesteps)
        self.enable_adapter(image_features or features.image_features, receive(batch.drop_image_embeds))
        text = features.text.to(self.base_model.device)
        with self._unet_precision():
            predicted = self.base_model.unet(
                noisy.to(self.base_model.dtype),
                timesteps,
                text.states.to(self.base_model.dtype),
                added_cond_kwargs=added_conditions(text, features.time_ids),
            ).sample
        return self.objective.sample_losses(predicted, target, timesteps)

    def _unet_precision(self) -> AbstractContextManager[Any]:
        """The frozen UNet computes in its own dtype: autocast would cast what its norms read and return to float32 on
        a GPU, which doubles much of the memory and costs time. A LoRA in float32 inside the UNet needs autocast.
        """
        if self.application.lora is not None:
            return nullcontext()
        return torch.autocast(self.base_model.device.type, enabled=False)

    def enable_adapter(self, image_features: Sequence[Tensor], drop_image_embeds: Tensor) -> None:
        """Let the UNet see these features [B, ...], but for the rows [B] that are dropped."""
        seen = dropped(image_features, self.no_image, drop_image_embeds)
        self.application.key_values = self.adapter(*(feature.float() for feature in seen))
        self.application.rows = range(len(drop_image_embeds))
        self.application.lora_weight = 1.0

    def disable_adapter(self) -> None:
        """Let the UNet behave as without adapter; call it after the backward pass."""
        self.application.key_values = None
        self.application.lora_weight = 0.0


@contextmanager
def adapt_unet(base_model: BaseModel, adapter: Any, objective: Objective | None = None) -> Iterator[AdaptedUNet]:
    """Put the adapter (or Accelerate's wrapper of it) into the UNet; afterwards the UNet is as it was."""
    plain: IPAdapter = extract_model_from_parallel(adapter)
    application = AdapterApplication(lora=plain.lora, name="the adapter in training")
    with base_model.temporarily_loaded():  # a training from a cache needs no image encoder afterwards
        no_image = dropped_features(base_model, plain.spec)
    with inject(base_model.unet, application):
        model = AdaptedUNet(base_model, adapter, application, objective or Objective(base_model.scheduler), no_image)
        model.disable_adapter()
        yield model
