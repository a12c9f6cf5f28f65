"""The training of an image adapter against a frozen UNet: a fresh adapter, its loss, and the loop.

    adapter = new_adapter(base_model)
    optimizer = new_optimizer(adapter, learning_rate=1e-4)
    for progress in train_steps(base_model, adapter, batches, optimizer=optimizer, generator=generator, steps=1000):
        ...

`batches` are pairs of `Features` and the rows whose image is dropped, from wherever: encoded on the fly, or cached.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import (
    AdapterApplication,
    IPAdapter,
    check_compatible,
    diffusers_sites,
    init_adapter,
    init_from_unet,
    inject,
    load_adapter,
    new_spec,
)

from .base_model import BaseModel
from .errors import DivergedError, TrainerError
from .features import Features
from .objective import dropped, noisy_latents_and_target

TrainingBatch = tuple[Features, Tensor]
"""Features of B examples, and [B], true or 1 for the rows whose image embedding is zeroed."""


@dataclass(frozen=True, eq=False)
class Progress:
    """After an optimizer step. Reading the loss's value waits for the device, so do it now and then only."""

    step: int
    loss: Tensor  # 0-d, the mean over the accumulated batches
    images: int  # in this step


def new_adapter(base_model: BaseModel, tokens: int = 4, init_from: Path | None = None) -> IPAdapter:
    """A trainable float32 base adapter for this model, on the CPU: keys and values copied from the UNet's own
    text layers and a random projector (paper, section 4.1.2), or the weights of the file `init_from`.

    Raises AdapterError when the file is not an adapter for this model, TrainerError when it has another kind,
    number of tokens or encoder width.
    """
    sites = diffusers_sites(base_model.unet)
    if init_from is not None:
        adapter = load_adapter(init_from, dtype=torch.float32)
        check_compatible(adapter.spec, sites, Path(init_from).name)
        found = (adapter.spec.kind, adapter.spec.tokens, adapter.spec.image_width)
        wanted = ("base", tokens, base_model.image_width)
        for what, has, expected in zip(("kind", "tokens", "image width"), found, wanted, strict=True):
            if has != expected:
                raise TrainerError(f"init_from {init_from}: its {what} is {has}, this training's {expected}.")
        return adapter.requires_grad_(True).train()
    spec = new_spec(
        "base",
        [site.width for site in sites],
        sites[0].context_width,
        image_width=base_model.image_width,
        tokens=tokens,
        encoder_id=base_model.encoder_name,
    )
    adapter = init_adapter(spec)
    init_from_unet(adapter.layers, base_model.unet)
    return adapter.train()


def new_optimizer(adapter: IPAdapter, learning_rate: float = 1e-4, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW over all of the adapter, constant learning rate (paper, section 4.1.2)."""
    return torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=weight_decay)


def training_loss(
    base_model: BaseModel,
    adapter: IPAdapter,
    features: Features,
    drop_image_embeds: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch (see `denoising_loss`), for use outside of the loop."""
    application = AdapterApplication()
    with inject(base_model.unet, application):
        return denoising_loss(
            base_model,
            adapter,
            application,
            features,
            drop_image_embeds=drop_image_embeds,
            generator=generator,
        )


def denoising_loss(
    base_model: BaseModel,
    adapter: IPAdapter,
    application: AdapterApplication,
    features: Features,
    *,
    drop_image_embeds: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the UNet's prediction at one uniform timestep per row; gradients reach the
    adapter only.

    `application` is injected in the UNet. Noise and timesteps are drawn on the CPU from `generator`, so they
    do not depend on the device.
    """
    latents, device = features.latents.float(), base_model.device
    noise = torch.randn(latents.shape, generator=generator).to(device)
    levels = int(base_model.scheduler.config["num_train_timesteps"])
    timesteps = torch.randint(levels, (len(latents),), generator=generator).to(device)
    noisy, target = noisy_latents_and_target(base_model.scheduler, latents.to(device), noise, timesteps)
    image_embeds = dropped(features.image_embeds.to(device), drop_image_embeds.to(device))
    application.key_values = adapter(image_embeds.float())
    text_states = features.text_states.to(device, base_model.dtype)
    predicted = base_model.unet(noisy.to(base_model.dtype), timesteps, text_states).sample
    return F.mse_loss(predicted.float(), target)


def train_steps(
    base_model: BaseModel,
    adapter: IPAdapter,
    batches: Iterable[TrainingBatch],
    *,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    steps: int,
    start: int = 0,
    accelerator: Accelerator | None = None,
    max_grad_norm: float = 1.0,
) -> Generator[Progress, None, None]:
    """Train from step `start` until `steps` steps are done, or the batches end; yields after each optimizer
    step.

    With an `accelerator`, `adapter` and `optimizer` are those that its `prepare` returned, and its
    `gradient_accumulation_steps` batches make a step. While the caller holds a Progress the UNet behaves as
    without adapter, so it may generate pictures; when the loop ends the UNet is as it was.
    """
    application = AdapterApplication(name="the adapter in training")
    accumulated = 1 if accelerator is None else accelerator.gradient_accumulation_steps
    losses: list[Tensor] = []
    images, step, source = 0, start, iter(batches)
    with inject(base_model.unet, application):
        while step < steps:
            try:
                features, drop_image_embeds = next(source)
            except StopIteration:
                return
            with _accumulating(accelerator, adapter):
                with nullcontext() if accelerator is None else accelerator.autocast():
                    loss = denoising_loss(
                        base_model,
                        adapter,
                        application,
                        features,
                        drop_image_embeds=drop_image_embeds,
                        generator=generator,
                    )
                _backward(accelerator, loss)
                losses.append(loss.detach())
                images += len(features)
                done = len(losses) == accumulated
                if done and max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(adapter.parameters(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            application.key_values = None
            if done:
                step += 1
                yield Progress(step, torch.stack(losses).mean(), images)
                losses, images = [], 0


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


def _accumulating(accelerator: Accelerator | None, adapter: IPAdapter) -> Any:
    return nullcontext() if accelerator is None else accelerator.accumulate(adapter)


def _backward(accelerator: Accelerator | None, loss: Tensor) -> None:
    if accelerator is None:
        loss.backward()
    else:
        accelerator.backward(loss)
