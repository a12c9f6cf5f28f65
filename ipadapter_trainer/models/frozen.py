"""Frozen convolutions that save no input for the backward pass.

PyTorch saves the input of every convolution, which only the gradient of its weight needs. A frozen UNet needs no such
gradient, and these inputs are a sixth of the memory that a training step saves.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input


class FrozenLayer(Protocol):
    """A linear map or a convolution whose weights are not trained."""

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output."""
        ...

    def input_gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        """The gradient of the input of this shape, from that of the output."""
        ...


class FrozenFunction(torch.autograd.Function):
    """Run a `FrozenLayer`, saving nothing but the layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(ctx.shape, grads[0]), None


class FrozenConv2d(nn.Conv2d):
    """An nn.Conv2d whose weights are not trained; it shares them with the layer that it is made from."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.options: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
        size: Any = layer.kernel_size
        super().__init__(layer.in_channels, layer.out_channels, size, *self.options, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return FrozenFunction.apply(input, self) if input.requires_grad else self.compute(input)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return F.conv2d(x, self.weight, self.bias, *self.options)

    def input_gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        """The gradient of the input, from that of the output."""
        weight = self.weight.to(grad.dtype)  # they differ after autocast
        return conv2d_input(shape, weight, grad, *self.options)


def release_conv_inputs(network: nn.Module) -> None:
    """Replace every nn.Conv2d of a frozen network, in place; weights and their names stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.padding_mode == "zeros":
                setattr(parent, name, FrozenConv2d(child))
