"""The loop that trains every part of the stack: seeded, resumable at any checkpoint, with a progress bar."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from ..shipped_emoji.loop import LossFunction, Progress, training_device


def fit(
    model: nn.Module,
    losses: LossFunction,
    *,
    checkpoint: Path,
    steps: int,
    minutes: float = float("inf"),
    batch_size: int = 0,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: int = 100,
    seed: int = 0,
    save_every_s: float = 120.0,
    bfloat16: bool = True,
) -> nn.Module:
    """Train until ``steps`` in all (earlier runs count) or ``minutes`` of this run; returns the model with EMA weights.

    The learning rate is constant after the warm-up, the weights are averaged, and what is random in a step depends on
    the seed and the step alone. So a later, longer run continues from the checkpoint as if it had never stopped.
    Only parameters that require a gradient are trained, on the GPU when there is one: there in ``bfloat16``, unless the
    losses need more. ``batch_size`` is that of ``losses``, for the
    checkpoint's count of images; without it they are not counted.
    """
    device = training_device()
    place: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}  # faster convolutions
    model.to(**place)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    ema = _new_ema(parameters)
    begun = done = _resume(checkpoint, parameters, optimizer, ema)
    generator = torch.Generator(device)
    start = saved = time.monotonic()
    model.train()
    bar = tqdm(total=steps, initial=done.step, desc=checkpoint.stem, unit="step", dynamic_ncols=True, mininterval=5.0)
    while done.step < steps and time.monotonic() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (done.step + 1) / warmup)
        generator.manual_seed(seed + (done.step << 16))
        torch.manual_seed(seed + (done.step << 16))
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and device.type == "cuda"):
            terms = losses(model, generator)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        done = Progress(done.step + 1, done.images + batch_size)
        bar.update()
        if done.step % 20 == 0:
            bar.set_postfix({name: f"{value.item():.4f}" for name, value in terms.items()}, refresh=False)
        if time.monotonic() - saved > save_every_s:
            _save(checkpoint, parameters, optimizer, ema, done)
            saved = time.monotonic()
    bar.close()
    _save(checkpoint, parameters, optimizer, ema, done)
    print(_speed(checkpoint.stem, device, done, begun, time.monotonic() - start), flush=True)
    ema.copy_to(parameters)
    place = {"device": "cpu", "memory_format": torch.contiguous_format}
    return model.to(**place).eval()


def _speed(name: str, device: torch.device, done: Progress, begun: Progress, seconds: float) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    steps, images = done.step - begun.step, done.images - begun.images
    speed = f", {images / seconds:,.0f} images/s" if images else ""
    return f"{name}: {steps:,} steps in {seconds:.0f} s{speed} ({where}); {done.step:,} steps in all"


def start_from(model: nn.Module, checkpoint: Path) -> None:
    """Write a checkpoint of step 0 that holds the model's weights, for ``fit`` to go on from."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    _save(checkpoint, parameters, torch.optim.AdamW(parameters), _new_ema(parameters), Progress())


def progress(checkpoint: Path) -> Progress:
    """What a checkpoint has seen."""
    return _progress(_load(checkpoint))


def _load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(state["step"], state["images"])


def _new_ema(parameters: list[nn.Parameter]) -> EMAModel:
    return EMAModel(parameters, decay=0.9995, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)


def _save(file: Path, parameters: list[nn.Parameter], optimizer: Any, ema: EMAModel, done: Progress) -> None:
    state = {
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        **done._asdict(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)  # a kill leaves the last good checkpoint


def _resume(file: Path, parameters: list[nn.Parameter], optimizer: Any, ema: EMAModel) -> Progress:
    if not file.is_file():
        return Progress()
    state = _load(file)
    for parameter, value in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(value)
    if state["step"] > 0:  # else there is nothing in it, and the settings are those of this run
        optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    ema.to(parameters[0].device)
    return _progress(state)
