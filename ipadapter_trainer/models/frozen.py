"""A frozen UNet that saves less for the backward pass.

PyTorch saves the input of every convolution, which only the gradient of its weight needs; a frozen UNet needs no such
gradient. What norms and activation functions return can be computed again faster than it is worth its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint


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


class RecomputedNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x)), computed again in the backward pass. It shares the weights of the norm it is made from."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        return _recomputed(self._compute, input)

    def _compute(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class TimeSiLU(nn.Module):
    """SiLU of the time embedding [B, C]. For hidden states [B, C, h, w] `RecomputedNormSiLU` has done it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if x.ndim == 2 else x


class RecomputedGEGLU(GEGLU):
    """diffusers' GEGLU, whose gate is computed again in the backward pass. It shares the layer of the original."""

    def __init__(self, original: GEGLU) -> None:
        nn.Module.__init__(self)
        self.proj = original.proj

    def forward(self, hidden_states: Tensor, *unused: Any) -> Tensor:
        return _recomputed(self._gated, self.proj(hidden_states))

    def _gated(self, x: Tensor) -> Tensor:
        hidden_states, gate = x.chunk(2, dim=-1)
        return hidden_states * F.gelu(gate)


def recompute_activations(unet: nn.Module) -> None:
    """Recompute the norms of the residual blocks and the gates of the transformer blocks of a diffusers UNet, in place;
    weights and their names stay.
    """
    for parent in list(unet.modules()):
        if type(parent) is ResnetBlock2D and parent.time_embedding_norm == "default":
            block: Any = parent
            if all(type(part) is kind for part, kind in ((block.norm1, nn.GroupNorm), (block.nonlinearity, nn.SiLU))):
                block.norm1, block.norm2 = RecomputedNormSiLU(block.norm1), RecomputedNormSiLU(block.norm2)
                block.nonlinearity = TimeSiLU()
        for name, child in list(parent.named_children()):
            if type(child) is GEGLU:
                setattr(parent, name, RecomputedGEGLU(child))


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not x.requires_grad:
        return function(x)
    output: Any = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return output
