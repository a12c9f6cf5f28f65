from __future__ import annotations

import pytest
import torch
from torch import nn

from ipadapter_trainer.models.float8 import FLOAT8, store_in_float8


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Linear(6, 5, bias=False), (2, 6)),
        (nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 8, 8)),
        (nn.Conv2d(4, 4, 1, groups=2), (2, 4, 8, 8)),
    ],
)
def test_a_layer_computes_with_its_rounded_weight(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Output and gradient equal those of the layer that holds the rounded weight in float32, bit by bit."""
    network = nn.Sequential(layer).requires_grad_(False)
    exact = layer.weight.clone()
    store_in_float8(network)
    rounded = network[0].full_weight(torch.float32)
    assert network[0].weight.dtype == FLOAT8
    assert ((rounded - exact).abs() <= exact.abs() / 16 + exact.abs().amax() / 448).all()  # three bits of mantissa
    layer.weight.copy_(rounded)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in range(2)]
    outputs = [layer(inputs[0]), network(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_autocast_decides_the_precision() -> None:
    network = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    store_in_float8(network)
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
