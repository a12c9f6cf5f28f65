from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from ipadapter_trainer.errors import ConfigError
from ipadapter_trainer.training.optimizers import AveragedWeights, new_optimizer, new_schedule


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def rates(name: str, steps: int, warmup: int, done: int = 0) -> list[float]:
    optimizer = new_optimizer(layer(), 1.0)
    schedule = new_schedule(optimizer, name, lr_warmup_steps=warmup, steps=steps, done=done)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - done - 1):
        optimizer.step()
        schedule.step()
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_the_learning_rate_rises_and_then_follows_its_schedule() -> None:
    assert rates("constant", 4, 0) == [1, 1, 1, 1]
    assert rates("constant", 6, 2) == [0, 0.5, 1, 1, 1, 1]
    expected = [0, 0.5] + [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates("cosine", 6, 2) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_a_resumed_schedule_goes_on_where_it_was(name: str) -> None:
    assert rates(name, 8, 3, done=5) == rates(name, 8, 3)[5:]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_average_is_applied_and_taken_back_bit_by_bit(decay: float) -> None:
    module = layer()
    optimizer = new_optimizer(module, 0.1)
    average = AveragedWeights(module, optimizer, decay)
    expected = module.weight.detach().clone()
    for number in range(4):
        step(module, optimizer)
        average.update()
        # diffusers' warm-up of the average: it begins with the weights after the first step.
        share = 0.0 if number == 0 else min(decay, (1 + number) / (10 + number))
        expected = share * expected + (1 - share) * module.weight.detach()
    trained = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
        assert torch.equal(module.weight, trained) == (not decay)
    assert torch.equal(module.weight, trained)
    assert average.exist == bool(decay)


def test_a_schedule_free_optimizer_averages_by_itself() -> None:
    pytest.importorskip("schedulefree")
    module = layer()
    optimizer = new_optimizer(module, 0.1, name="schedulefree")
    average = AveragedWeights(module, optimizer)
    for _ in range(3):
        step(module, optimizer)
    trained = module.weight.detach().clone()
    with average.applied():
        assert not torch.equal(module.weight, trained)
    assert torch.equal(module.weight, trained)
    step(module, optimizer)  # it is in training again


def test_an_average_goes_on_from_its_state() -> None:
    module = layer()
    optimizer = new_optimizer(module, 0.1)
    average = AveragedWeights(module, optimizer, 0.9)
    step(module, optimizer)
    average.update()
    other = AveragedWeights(module, optimizer, 0.9)
    other.load_state_dict(average.state_dict())
    for each in (average, other):
        each.update()
    assert all(torch.equal(a, b) for a, b in zip(average.ema.shadow_params, other.ema.shadow_params, strict=True))


def test_a_resumed_average_starts_from_the_resumed_weights_and_has_this_runs_decay() -> None:
    """A run that adds ema_decay, or changes it."""
    module = layer()
    optimizer = new_optimizer(module, 0.1)
    added = AveragedWeights(module, optimizer, 0.9)  # as in `prepare`, before the checkpoint is loaded
    with torch.no_grad():
        module.weight.fill_(3.0)
    added.load_state_dict({})
    with added.applied():
        assert torch.equal(module.weight, torch.full_like(module.weight, 3.0))
    changed = AveragedWeights(module, optimizer, 0.5)
    changed.load_state_dict(added.state_dict())
    assert changed.ema is not None and changed.ema.decay == 0.5


@pytest.mark.parametrize(
    ("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")]
)
def test_a_missing_library_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import of an absent module finds
    with pytest.raises(ConfigError, match=f"{package}.*pip install"):
        new_optimizer(layer(), name=name)
