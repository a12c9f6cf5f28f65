"""A frozen network stored in float8: half the memory of bfloat16, and gradients still flow through it.

diffusers' layerwise casting stores weights like this too, but fails in the backward pass: autograd finds float8
weights in place of those that it saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .frozen import FrozenFunction

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class _Float8Layer(nn.Module):
    """Weights with one scale per output channel, so that small weights keep their precision."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().flatten(1).amax(1).clamp(min=1e-12) / _LARGEST
        self.register_buffer("scale", scale.view(-1, *(1,) * (weight.ndim - 1)))
        self.register_buffer("weight", (weight / self.scale).to(FLOAT8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return FrozenFunction.apply(x, self)

    def full_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in the dtype of a computation."""
        return self.weight.to(dtype).mul_(self.scale)  # in place: no second tensor of the weight's size

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output."""
        raise NotImplementedError

    def input_gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        """The gradient of the input, from that of the output."""
        raise NotImplementedError


class Float8Linear(_Float8Layer):
    """A frozen nn.Linear in float8."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def compute(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.full_weight(x.dtype), bias)

    def input_gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        return grad @ self.full_weight(grad.dtype)


class Float8Conv2d(_Float8Layer):
    """A frozen nn.Conv2d in float8."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self._options: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def compute(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.full_weight(x.dtype), bias, *self._options)

    def input_gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        return conv2d_input(shape, self.full_weight(grad.dtype), grad, *self._options)


def store_in_float8(network: nn.Module) -> None:
    """Replace every Linear and Conv2d of a frozen network, in place; norms and embeddings keep their precision."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Float8Linear(child))
            elif isinstance(child, nn.Conv2d):
                setattr(parent, name, Float8Conv2d(child))
