"""The loss of a training step: the frozen UNet with the adapter in it (paper, arXiv 2308.06721).

x_t = alpha_t x_0 + sigma_t eps                     noisy latents (eq. 1); eps and t come with the batch
c_i = projector(image features)                     image tokens, those of no image where the image is dropped
Z = Attention(Q, K, V) + Attention(Q, K_i, V_i)     in every cross-attention layer (eq. 5), K_i = c_i W'_k
L = || eps - eps_theta(x_t, c_t, c_i, t) ||^2       (eq. 3); gradients reach the projector, W'_k and W'_v only
"""

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
from ..models.conditioning import TextStates, added_conditions
from ..models.features import Features
from ..models.image_features import dropped_features
from .objective import Objective, dropped, noisy_latents_and_target


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """B encoded examples with their noise, timesteps and dropout, so that the loss has no randomness of its own."""

    features: Features
    drop_image_embeds: Tensor  # [B], true or 1 where the image prompt is dropped
    noise: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # int64 [B]

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, eq=False)
class AdaptedUNet:
    """The frozen UNet with the adapter in it, by `adapt_unet`. `no_image`: features [1, ...] of a dropped image."""

    base_model: BaseModel
    adapter: Any  # IPAdapter, or Accelerate's wrapper of one
    application: AdapterApplication
    objective: Objective
    no_image: tuple[Tensor, ...]

    def loss(self, batch: TrainBatch) -> Tensor:
        """The mean of `sample_losses`."""
        return self.sample_losses(batch).mean()

    def sample_losses(self, batch: TrainBatch, image_features: Sequence[Tensor] | None = None) -> Tensor:
        """The losses [B] of the UNet's predictions; gradients reach the adapter only. `image_features` replaces those
        of the batch. Leaves the adapter enabled, which gradient checkpointing needs in the backward pass.
        """
        receive, features = self.base_model.to_device, batch.features
        timesteps = receive(batch.timesteps)
        latents, noise = receive(features.latents), receive(batch.noise)
        noisy, target = noisy_latents_and_target(self.objective.scheduler, latents, noise, timesteps)
        self.enable_adapter(image_features or features.image_features, receive(batch.drop_image_embeds))
        predicted = self.predict(noisy, timesteps, features.text, features.time_ids)
        return self.objective.sample_losses(predicted, target, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextStates, time_ids: Tensor | None = None) -> Tensor:
        """The UNet's output [B, 4, h, w] for noisy latents, with the adapter as it is: enabled or not."""
        text = text.to(self.base_model.device)
        with self._unet_precision():
            return self.base_model.unet(
                noisy.to(self.base_model.dtype),
                timesteps,
                text.states.to(self.base_model.dtype),
                added_cond_kwargs=added_conditions(text, time_ids),
            ).sample

    def _unet_precision(self) -> AbstractContextManager[Any]:
        """No autocast: on a GPU it would run the frozen UNet's norms in float32, which doubles much of the memory and
        takes longer. A float32 LoRA inside the UNet needs autocast.
        """
        if self.application.lora is not None:
            return nullcontext()
        return torch.autocast(self.base_model.device.type, enabled=False)

    def enable_adapter(self, image_features: Sequence[Tensor], drop_image_embeds: Tensor) -> None:
        """Use these image features [B, ...] in the UNet, and `no_image` where `drop_image_embeds` [B] is true."""
        features = dropped(image_features, self.no_image, drop_image_embeds)
        self.application.key_values = self.adapter(*(feature.float() for feature in features))
        self.application.rows = range(len(drop_image_embeds))
        self.application.lora_weight = 1.0

    def disable_adapter(self) -> None:
        """Make the UNet behave as without adapter. Call it after the backward pass."""
        self.application.key_values = None
        self.application.lora_weight = 0.0


@contextmanager
def adapt_unet(base_model: BaseModel, adapter: Any, objective: Objective | None = None) -> Iterator[AdaptedUNet]:
    """Put the adapter (or Accelerate's wrapper of it) into the UNet, and restore the UNet on exit."""
    plain: IPAdapter = extract_model_from_parallel(adapter)
    application = AdapterApplication(lora=plain.lora, name="the adapter in training")
    with base_model.temporarily_loaded():  # with a cache, the image encoder is not needed again
        no_image = dropped_features(base_model, plain.spec)
    with inject(base_model.unet, application):
        model = AdaptedUNet(base_model, adapter, application, objective or Objective(base_model.scheduler), no_image)
        model.disable_adapter()
        yield model
