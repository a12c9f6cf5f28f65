"""The layer classes that a host may replace (ComfyUI passes `comfy.ops.manual_cast`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn


class Operations(Protocol):
    """Anything with `Linear` and `LayerNorm`: `torch.nn` itself, or a class such as `comfy.ops.manual_cast`."""

    @property
    def Linear(self) -> Callable[..., nn.Module]: ...

    @property
    def LayerNorm(self) -> Callable[..., nn.Module]: ...
