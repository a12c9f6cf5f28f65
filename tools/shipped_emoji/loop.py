"""The loop that trains every part of the stack: seeded, resumable at any checkpoint, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

# Takes the model and a generator that decides everything random of the batch; returns named losses, "loss" among them.
LossFunction = Callable[[nn.Module, torch.Generator], dict[str, Tensor]]

Model = TypeVar("Model", bound=nn.Module)


class Progress(NamedTuple):
    """How many steps, and images in them where they are counted, a part was trained for, all runs together."""

    step: int = 0
    images: int = 0


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
) -> nn.Module:
    """Train until ``steps`` in all (earlier runs count) or ``minutes`` of this run; returns the model with EMA weights.

    The learning rate is constant after the warm-up and the weights are averaged, so a later, longer run continues
    from the checkpoint as if it had never stopped. Only parameters that require a gradient are trained,
    on the GPU when there is one. ``batch_size`` is that of ``losses``, for the checkpoint's count of images;
    without it they are not counted.
    """
    place: dict[str, Any] = {"device": training_device(), "memory_format": torch.channels_last}  # faster convolutions
    model.to(**place)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema = _new_ema(parameters)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    done = _resume(checkpoint, parameters, optimizer, ema, generator)
    start = saved = time.monotonic()
    model.train()
    bar = tqdm(total=steps, initial=done.step, desc=checkpoint.stem, unit="step", dynamic_ncols=True, mininterval=5.0)
    while done.step < steps and time.monotonic() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (done.step + 1) / warmup)
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
            _save(checkpoint, parameters, optimizer, ema, generator, done)
            saved = time.monotonic()
    bar.close()
    _save(checkpoint, parameters, optimizer, ema, generator, done)
    ema.copy_to(parameters)
    place = {"device": "cpu", "memory_format": torch.contiguous_format}
    return model.to(**place).eval()


def start_from(model: nn.Module, checkpoint: Path, seed: int = 0) -> None:
    """Write a checkpoint of step 0 that holds the model's weights, for ``fit`` to go on from."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    ema = _new_ema(parameters)
    _save(checkpoint, parameters, optimizer, ema, torch.Generator().manual_seed(seed), Progress())


def training_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_training_device(model: Model) -> Model:
    """The model, moved there."""
    nn.Module.to(model, training_device())
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; batches are drawn on the CPU, so that every device sees the same ones, and go there."""
    return next(model.parameters()).device


def load_ema(model: nn.Module, checkpoint: Path) -> nn.Module:
    """Put the averaged weights of a checkpoint into ``model`` (whose trained parameters must be the same)."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist: train this part first")
    state = _load(checkpoint)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.load_state_dict(state.get("buffers", {}), strict=False)
    for parameter, value in zip(parameters, state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(value)
    return model.eval()


def progress(checkpoint: Path) -> Progress:
    """What a checkpoint has seen."""
    return _progress(_load(checkpoint), checkpoint)


def _load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True, map_location="cpu")


def _progress(state: dict[str, Any], checkpoint: Path) -> Progress:
    if "images" not in state:
        raise ValueError(
            f"{checkpoint} holds {state['step']} steps and no count of images: it was written by an older version. "
            "Go on with that version, or move the file away and train this part anew."
        )
    return Progress(state["step"], state["images"])


def _new_ema(parameters: list[nn.Parameter]) -> EMAModel:
    return EMAModel(parameters, decay=0.9995, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)


def _save(
    file: Path,
    parameters: list[nn.Parameter],
    optimizer: Any,
    ema: EMAModel,
    generator: torch.Generator,
    done: Progress,
) -> None:
    state = {
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "generator": generator.get_state(),
        "global_generator": torch.get_rng_state(),
        **done._asdict(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)  # a kill leaves the last good checkpoint


def _resume(
    file: Path, parameters: list[nn.Parameter], optimizer: Any, ema: EMAModel, generator: torch.Generator
) -> Progress:
    if not file.is_file():
        return Progress()
    state = _load(file)
    done = _progress(state, file)
    for parameter, value in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(value)
    if state["step"] > 0:  # else there is nothing in it, and the settings are those of this run
        optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    ema.to(parameters[0].device)
    generator.set_state(state["generator"])
    torch.set_rng_state(state["global_generator"])
    return done
