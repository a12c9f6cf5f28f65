"""CUDA graphs: where they are used, and on a GPU that they change no result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ipadapter_trainer.errors import ConfigError
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.checks import use_cuda_graphs
from ipadapter_trainer.training.train import train


def used(settings: dict[str, Any], device: str = "cuda", processes: int = 1, **more: Any) -> bool:
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
    return use_cuda_graphs(make_config(settings | more), accelerator)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp8"])
def test_a_gpu_uses_them(settings: dict[str, Any], precision: str) -> None:
    assert used(settings, mixed_precision=precision)
    assert used(settings, mixed_precision=precision, cuda_graphs=True)
    assert not used(settings, mixed_precision=precision, cuda_graphs=False)


@pytest.mark.parametrize(
    ("where", "more", "named"),
    [
        ({"device": "cpu"}, {}, "on a CPU"),
        ({"processes": 2}, {}, "with several processes"),
        ({}, {"gradient_checkpointing": True}, "with gradient_checkpointing=true"),
        ({}, {"compile": True}, "with compile=true"),
        ({}, {"mixed_precision": "fp16"}, "with mixed_precision=fp16"),
    ],
    ids=["CPU", "processes", "checkpointing", "compile", "fp16"],
)
def test_what_they_do_not_work_with(
    settings: dict[str, Any], where: dict[str, Any], more: dict[str, Any], named: str
) -> None:
    """Left out by default, refused where they were asked for."""
    assert not used(settings, **where, **more)
    with pytest.raises(ConfigError, match=f"cuda_graphs=true does not work {named}. Leave it out"):
        used(settings, **where, **more, cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "more", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}, {"buckets": True}]
)
def test_the_losses_are_those_without(settings: dict[str, Any], more: dict[str, Any]) -> None:
    found = []
    for graphs in (False, True):
        losses: list[torch.Tensor] = []
        given = settings | more | {"steps": 6, "cuda_graphs": graphs, "output": f"{settings['output']}-{graphs}"}
        train(make_config(given), on_progress=lambda progress, losses=losses: losses.append(progress.loss))
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=1e-3 if "mixed_precision" in more else 1e-5, atol=0)
