"""Convolutions of the frozen UNet keep nothing that no gradient needs."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ipadapter_trainer.models.frozen import FrozenConv2d, recompute_activations, release_conv_inputs


def _kept(run: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes that autograd keeps for the backward pass beside the weights."""
    weights = {parameter.data_ptr() for parameter in run.parameters()}
    kept: dict[tuple[int, torch.Size], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr(), tensor.shape] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(*inputs)
    return output, sum(kept.values())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 6, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_convolution(layer: nn.Conv2d, dtype: torch.dtype) -> None:
    network = nn.Sequential(copy.deepcopy(layer)).to(dtype).requires_grad_(False)
    frozen = copy.deepcopy(network)
    release_conv_inputs(frozen)
    assert isinstance(frozen[0], FrozenConv2d)
    assert frozen.state_dict().keys() == network.state_dict().keys()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    outputs = [run(each * 1) for run, each in zip((network, frozen), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(network(x), frozen(x))  # without a gradient


def test_autocast_decides_the_precision() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    release_conv_inputs(network)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_a_unet_keeps_less_and_has_the_same_gradient() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).requires_grad_(False)
    noisy, steps = torch.randn(2, 4, 16, 16), torch.tensor([1, 500])
    found = []
    names = unet.state_dict().keys()
    for change in (release_conv_inputs, recompute_activations, lambda unet: None):
        context = torch.ones(2, 5, 16, requires_grad=True)
        output, kept = _kept(unet, noisy, steps, context)
        output.sample.square().mean().backward()
        found.append((output.sample.detach(), context.grad, kept))
        change(unet)
    (before, gradient, most), *others = found
    assert all(torch.equal(before, after) and torch.equal(gradient, same) for after, same, _ in others)
    less, least = (kept for *_, kept in others)
    assert less < 0.9 * most
    assert least < 0.75 * less
    assert unet.state_dict().keys() == names
