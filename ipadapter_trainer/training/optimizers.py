"""Optimizers, learning rate schedules and averaged weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ConfigError

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}


def new_optimizer(
    adapter: nn.Module, learning_rate: float = 1e-4, weight_decay: float = 0.01, name: str = "adamw"
) -> torch.optim.Optimizer:
    """An optimizer over all of the adapter. "adamw" is the paper's (section 4.1.2), in PyTorch's fused form.

    Raises ConfigError if another optimizer's library is not installed or cannot run on this machine.
    """
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    check_optimizer(name)
    library: Any = importlib.import_module(_PACKAGES[name])
    if name == "adamw8bit":
        return library.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "prodigy":
        return library.Prodigy(parameters, lr=learning_rate, weight_decay=weight_decay, safeguard_warmup=True)
    optimizer = library.AdamWScheduleFree(parameters, lr=learning_rate, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


def check_optimizer(name: str) -> None:
    """Raises ConfigError if the optimizer's library is not installed or cannot run on this machine."""
    if name == "adamw":
        return
    if name not in _PACKAGES:
        raise ConfigError(f"unknown optimizer {name!r}; expected one of adamw, {', '.join(_PACKAGES)}.")
    try:
        importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"optimizer={name} needs {_PACKAGES[name]}. Install it with: pip install 'ip-adapter-kit[optimizers]'"
        ) from error
    if name == "adamw8bit" and not torch.cuda.is_available():
        raise ConfigError("optimizer=adamw8bit needs a GPU; this machine has none. Use optimizer=adamw.")


def new_schedule(
    optimizer: torch.optim.Optimizer, name: str, *, lr_warmup_steps: int, steps: int, done: int = 0
) -> LRScheduler:
    """A warm-up, then diffusers' schedule `name`, over `steps` steps, continued after step `done`."""
    known = "constant_with_warmup" if name == "constant" else name
    schedule = get_scheduler(known, optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=steps)
    schedule.last_epoch = done
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(done)
    return schedule


class AveragedWeights:
    """The weights that are exported and validated: an average over the steps if there is one, else the current ones.

    `decay` keeps an exponential moving average (diffusers' EMAModel); a schedule-free optimizer has its own average.
    """

    def __init__(self, adapter: nn.Module, optimizer: torch.optim.Optimizer, decay: float = 0.0) -> None:
        self._parameters = [p for p in adapter.parameters() if p.requires_grad]
        self._optimizer = optimizer
        self._decay = decay
        self.ema = EMAModel(self._parameters, decay=decay) if decay else None

    @property
    def schedule_free(self) -> Any | None:
        """The optimizer, if it averages the weights itself."""
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner if type(inner).__module__.startswith("schedulefree") else None

    @property
    def exist(self) -> bool:
        """Whether there is an average."""
        return self.ema is not None or self.schedule_free is not None

    def update(self) -> None:
        """Call it after each optimizer step."""
        if self.ema is not None:
            self.ema.step(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the adapter; on exit its own weights are restored exactly."""
        if not self.exist:
            yield
            return
        kept = [p.detach().clone() for p in self._parameters]
        if self.ema is not None:
            self.ema.copy_to(self._parameters)
        elif self.schedule_free is not None:
            self.schedule_free.eval()
        try:
            yield
        finally:
            if self.schedule_free is not None:
                self.schedule_free.train()
            with torch.no_grad():  # the optimizer's own way back is not exact
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The EMA's state; empty without one."""
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, with this run's decay. If it has no EMA, the average starts from the current weights."""
        if self.ema is None:
            return
        self.ema = EMAModel(self._parameters, decay=self._decay)
        if state:
            self.ema.load_state_dict({**state, "decay": self._decay})
            self.ema.to(self._parameters[0].device)
