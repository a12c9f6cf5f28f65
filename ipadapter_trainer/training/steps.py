"""The training steps: loss, backward, clip, optimizer step.

    adapter = new_adapter(base_model, TRAIN_KINDS["base"])
    optimizer = new_optimizer(adapter, learning_rate=1e-4)
    with adapt_unet(base_model, adapter) as model:
        for progress in train_steps(model, batches, optimizer=optimizer, steps=1000):
            ...

Batches contain their noise and timesteps, so the loop has no randomness of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..errors import DivergedError
from .adapted_unet import AdaptedUNet, TrainBatch

MAX_OVERFLOWS = 30  # in a row; each halves the loss scale, which begins at 65,536

SomeBatch = TypeVar("SomeBatch", bound=Sized)


@dataclass(frozen=True, eq=False)
class Progress:
    """The result of an optimizer step. Reading a tensor's value waits for the device, so do it rarely."""

    step: int
    loss: Tensor  # 0-d, the mean over the accumulated batches of this process
    images: int  # since the step before, in this process
    grad_norm: Tensor | None = None  # before clipping; None when gradients are not clipped
    batches: int = 0  # since the start, in this process


def backward(model: AdaptedUNet, batch: TrainBatch, accelerator: Accelerator | None = None) -> Tensor:
    """Add the gradients of a batch to the adapter's, and disable the adapter. Returns the loss, detached."""
    with nullcontext() if accelerator is None else accelerator.autocast():
        loss = model.loss(batch)
    loss.backward() if accelerator is None else accelerator.backward(loss)
    model.disable_adapter()
    return loss.detach()


def train_steps(
    model: AdaptedUNet,
    batches: Iterable[SomeBatch],
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    schedule: LRScheduler | None = None,
    accelerator: Accelerator | None = None,
    max_grad_norm: float = 1.0,
    compute: Callable[[SomeBatch], Tensor] | None = None,
    keep_gradients: bool = False,
) -> Generator[Progress, None, None]:
    """Train from step `start` until `steps` steps are done or the batches end; yields after each optimizer step.

    With an `accelerator`, the adapter and the optimizer are those that its `prepare` returned, and its
    `gradient_accumulation_steps` batches make a step. Between steps the adapter is disabled, so the caller may
    generate images with the UNet.

    `compute` replaces `backward`, for batches of another form than TrainBatch. `keep_gradients` zeroes the gradients
    where they are instead of releasing them (`cuda_graphs.GraphedBackward`).

    In float16 gradients may overflow. The loss scaler then skips the optimizer step; it is not counted, and the
    schedule does not advance. Raises DivergedError after `MAX_OVERFLOWS` of them in a row.
    """
    compute = compute or (lambda batch: backward(model, cast("Any", batch), accelerator))
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
            losses.append(compute(batch))
            images += len(batch)
            done = len(losses) == accumulated
            if done and max_grad_norm:
                norm = clip(model.adapter.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not keep_gradients)
        used += 1
        if not done:
            continue
        # Not `step_was_skipped` of Accelerate's optimizer: it does not see the skips of a fused optimizer.
        before, scale = scale, scale if scaler is None else scaler.get_scale()
        if scale < before:
            overflows += 1
            if overflows == MAX_OVERFLOWS:
                raise DivergedError(
                    f"The gradients overflowed in float16 {overflows} times in a row after step {step}. Run it again "
                    "with mixed_precision=bf16 or no, or with a lower learning_rate."
                )
        else:
            if schedule is not None:
                schedule.step()
            step, overflows = step + 1, 0
            yield Progress(step, torch.stack(losses).mean(), images, norm, used)
            images = 0
        losses = []


def check_loss(step: int, loss: float) -> float:
    """Return the loss. Raises DivergedError if it is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss is {loss} at step {step}: the training diverged. Run it again with a lower learning_rate; it "
            "starts from the last checkpoint, if there is one."
        )
    return loss
