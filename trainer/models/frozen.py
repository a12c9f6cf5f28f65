"""Frozen convolutions that keep no input for the backward pass.

PyTorch keeps the input of every convolution, which only the gradient of its weight needs. In a frozen UNet nobody
asks for that gradient, and the inputs are a sixth of what a training step keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _FrozenConvolution(torch.autograd.Function):
    """A 2-d convolution with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, grad = ctx.layer, grads[0]
        weight = layer.weight.to(grad.dtype)  # they differ after autocast
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *layer.options), None


class FrozenConv2d(nn.Conv2d):
    """An nn.Conv2d whose weights are not trained; shares them with the layer it is made of."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.options: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, *self.options, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenConvolution.apply(x, self) if x.requires_grad else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return F.conv2d(x, self.weight, self.bias, *self.options)


def release_conv_inputs(network: nn.Module) -> None:
    """Replace every nn.Conv2d of a frozen network, in place. Weights and their names stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.padding_mode == "zeros":
                setattr(parent, name, FrozenConv2d(child))
