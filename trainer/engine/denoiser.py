"""The training of an image adapter against a frozen UNet: a fresh adapter, its loss, and the loop.

    adapter = new_adapter(base_model, TRAIN_KINDS["base"])
    optimizer = new_optimizer(adapter, learning_rate=1e-4)
    with denoiser(base_model, adapter) as model:
        for progress in train_steps(model, batches, optimizer=optimizer, steps=1000):
            ...

The batches may come from wherever: encoded on the fly, or cached. They hold their own noise and timesteps, so the
loop has no randomness of its own.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ipadapter_core import (
    AdapterApplication,
    AdapterSpec,
    IPAdapter,
    check_compatible,
    init_adapter,
    init_from_unet,
    inject,
    load_adapter,
)

from ..errors import DivergedError, TrainerError
from ..models.base_model import BaseModel
from ..models.conditioning import added_conditions
from ..models.hub import refuse_missing
from ..models.image_features import dropped_features
from ..settings.kinds import TRAIN_KINDS, TrainKind, spec_for
from .features import Features
from .objective import Objective, dropped, noisy_latents_and_target

MAX_OVERFLOWS = 30  # in a row; each halves the loss scale, which begins at 65,536


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """B examples, and the draws that make a training step of them."""

    features: Features
    drop_image_embeds: Tensor  # [B], true or 1 for the rows whose image is dropped
    noise: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # int64 [B]


@dataclass(frozen=True, eq=False)
class Progress:
    """After an optimizer step. Reading a tensor's value waits for the device, so do it now and then only."""

    step: int
    loss: Tensor  # 0-d, the mean over the accumulated batches of this process
    images: int  # since the step before, in this process
    grad_norm: Tensor | None = None  # before clipping; None when gradients are not clipped
    batches: int = 0  # since the start, in this process


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The frozen UNet with the adapter in it; made by `denoiser`. `no_image` are the features of a dropped image."""

    base_model: BaseModel
    adapter: Any  # IPAdapter, or Accelerate's wrapper of one
    application: AdapterApplication
    objective: Objective
    no_image: tuple[Tensor, ...]

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The mean of `row_losses`."""
        return self.row_losses(batch).mean()

    def row_losses(self, batch: TrainingBatch, image_features: Sequence[Tensor] | None = None) -> Tensor:
        """The error [B] of the UNet's predictions; gradients reach the adapter only. `image_features` replaces the
        batch's own.
        """
        receive, features = self.base_model.receive, batch.features
        timesteps = receive(batch.timesteps)
        latents, noise = receive(features.latents), receive(batch.noise)
        noisy, target = noisy_latents_and_target(self.objective.scheduler, latents, noise, timesteps)
        self.show(image_features or features.image_features, receive(batch.drop_image_embeds))
        text = features.text.to(self.base_model.device)
        with self._unet_precision():
            predicted = self.base_model.unet(
                noisy.to(self.base_model.dtype),
                timesteps,
                text.states.to(self.base_model.dtype),
                added_cond_kwargs=added_conditions(text, features.time_ids),
            ).sample
        return self.objective.row_losses(predicted, target, timesteps)

    def _unet_precision(self) -> AbstractContextManager[Any]:
        """The frozen UNet computes in its own dtype: autocast would cast what its norms read and return to float32 on
        a GPU, which doubles much of the memory and costs time. A LoRA in float32 inside the UNet needs autocast.
        """
        if self.application.lora is not None:
            return nullcontext()
        return torch.autocast(self.base_model.device.type, enabled=False)

    def show(self, image_features: Sequence[Tensor], drop_image_embeds: Tensor) -> None:
        """Let the UNet see these features [B, ...], but for the rows [B] that are dropped."""
        seen = dropped(image_features, self.no_image, drop_image_embeds)
        self.application.key_values = self.adapter(*(feature.float() for feature in seen))
        self.application.rows = range(len(drop_image_embeds))
        self.application.lora_weight = 1.0

    def rest(self) -> None:
        """Let the UNet behave as without adapter; call it after the backward pass."""
        self.application.key_values = None
        self.application.lora_weight = 0.0


@contextmanager
def denoiser(base_model: BaseModel, adapter: Any, objective: Objective | None = None) -> Iterator[Denoiser]:
    """Put the adapter (or Accelerate's wrapper of it) into the UNet; afterwards the UNet is as it was."""
    plain: IPAdapter = extract_model_from_parallel(adapter)
    application = AdapterApplication(lora=plain.lora, name="the adapter in training")
    with base_model.borrowed():  # a training from a cache needs no image encoder afterwards
        no_image = dropped_features(base_model, plain.spec)
    with inject(base_model.unet, application):
        model = Denoiser(base_model, adapter, application, objective or Objective(base_model.scheduler), no_image)
        model.rest()
        yield model


def adapter_spec(base_model: BaseModel, kind: TrainKind, tokens: int | None = None) -> AdapterSpec:
    """The spec of a new adapter of this kind for this model, from configs alone."""
    return spec_for(
        kind,
        [site.width for site in base_model.sites],
        base_model.sites[0].context_width,
        image_embeds_width=base_model.image_width if kind.takes_image else None,
        hidden_width=base_model.hidden_width if kind.takes_image else None,
        image_tokens=base_model.image_tokens if kind.takes_image else None,
        tokens=tokens,
        encoder_id=base_model.encoder_name if kind.takes_image else None,
    )


def new_adapter(
    base_model: BaseModel,
    kind: TrainKind = TRAIN_KINDS["base"],
    tokens: int | None = None,
    init_from: Path | None = None,
) -> IPAdapter:
    """A trainable float32 adapter for this model, on the CPU: keys and values copied from the UNet's own
    text layers and a random projector (paper, section 4.1.2), or the weights of the file `init_from`.

    Raises AdapterError when the file is not an adapter for this model, TrainerError when it has another kind,
    number of tokens or encoder width.
    """
    if init_from is not None:
        return read_initial_adapter(base_model, kind, tokens, init_from).requires_grad_(True).train()
    adapter = init_adapter(adapter_spec(base_model, kind, tokens))
    init_from_unet(adapter.layers, base_model.unet)
    return adapter.train()


def read_initial_adapter(base_model: BaseModel, kind: TrainKind, tokens: int | None, init_from: Path) -> IPAdapter:
    """The adapter of the file `init_from`, frozen, in float32; no weight of the model is read.

    Raises as `new_adapter`.
    """
    spec = adapter_spec(base_model, kind, tokens)
    refuse_missing(init_from)
    adapter = load_adapter(init_from, dtype=torch.float32, shortcut=spec.shortcut)
    check_compatible(adapter.spec, base_model.sites, Path(init_from).name)
    for what in ("kind", "tokens", "image_width", "face_width", "lora_rank"):
        found, wanted = getattr(adapter.spec, what), getattr(spec, what)
        if found != wanted:
            raise TrainerError(
                f"init_from {init_from}: its {what.replace('_', ' ')} is {found}, this training's {wanted}. Set kind, "
                "tokens and image_encoder to the file's (`ipadapter inspect` prints them), or choose another file."
            )
    return adapter


def train_steps(
    model: Denoiser,
    batches: Iterable[TrainingBatch],
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    schedule: LRScheduler | None = None,
    accelerator: Accelerator | None = None,
    max_grad_norm: float = 1.0,
) -> Generator[Progress, None, None]:
    """Train from step `start` until `steps` steps are done, or the batches end; yields after each optimizer
    step.

    With an `accelerator`, the adapter and the optimizer are those that its `prepare` returned, and its
    `gradient_accumulation_steps` batches make a step. While the caller holds a Progress the UNet behaves as
    without adapter, so it may generate pictures.

    In float16 gradients may overflow. The loss scaler then skips the optimizer's step, so it is none: it is not
    counted, the schedule stays, and the next batches make it. Raises DivergedError when that does not end.
    """
    accumulated = 1 if accelerator is None else accelerator.gradient_accumulation_steps
    scaler = None if accelerator is None else accelerator.scaler
    clip: Any = torch.nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
    scale = 0.0 if scaler is None else scaler.get_scale()
    losses: list[Tensor] = []
    images, used, overflows, step, norm, source = 0, 0, 0, start, None, iter(batches)
    while step < steps:
        batch = next(source, None)
        if batch is None:
            return
        with nullcontext() if accelerator is None else accelerator.accumulate(model.adapter):
            with nullcontext() if accelerator is None else accelerator.autocast():
                loss = model.loss(batch)
            loss.backward() if accelerator is None else accelerator.backward(loss)
            model.rest()
            losses.append(loss.detach())
            images += len(batch.features)
            done = len(losses) == accumulated
            if done and max_grad_norm:
                norm = clip(model.adapter.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        used += 1
        if not done:
            continue
        # Not `step_was_skipped` of Accelerate's optimizer: it does not see the skips of a fused optimizer.
        before, scale = scale, scale if scaler is None else scaler.get_scale()
        if scale < before:
            overflows += 1
            if overflows == MAX_OVERFLOWS:
                raise DivergedError(
                    f"The gradients overflowed in float16 {overflows} times in a row after step {step}. Resume with "
                    "mixed_precision=bf16 or no, or from an earlier checkpoint with a lower learning_rate."
                )
        else:
            if schedule is not None:
                schedule.step()
            step, overflows = step + 1, 0
            yield Progress(step, torch.stack(losses).mean(), images, norm, used)
            images = 0
        losses = []


def check_loss(step: int, loss: float) -> float:
    """The loss, when it is a number.

    Raises DivergedError otherwise.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss is {loss} at step {step}: the training diverged. Resume from an earlier checkpoint with a "
            "lower learning_rate."
        )
    return loss
