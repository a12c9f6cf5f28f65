"""What an adapter adds to a forward pass, counted in calls of torch's operators."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")
MATMULS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.matmul", "aten.linear")
STEPS = 4


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function).rpartition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def in_the_layers(world, model, monkeypatch):
    """Calls within the diffusion model, for one forward pass."""
    counting = Counting()
    original = model.model.diffusion_model.forward

    def forward(*args, **kwargs):
        with counting:
            return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.model.diffusion_model, "forward", forward)
        world.sample(model, steps=1)
    return counting.calls


def in_all(world, model):
    """Calls of a whole run."""
    with Counting() as counting:
        world.sample(model, steps=STEPS)
    return counting.calls


@pytest.mark.parametrize(("family", "layers"), [("sd15", 16), ("sdxl", 70)])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_in_the_layers(world, monkeypatch, family, layers, masked):
    """Two calls split the query, one attends, two merge, one adds, with a mask or without. No matrix product but the
    attention's, and nothing that waits for the device.
    """
    model = world.new_model(family)
    adapter = world.new_adapter(model)
    mask = torch.ones(1, 8, 8) if masked else None
    patched = world.apply(model, adapter, world.new_prompt(adapter), attn_mask=mask, end_at=0.999)
    added = in_the_layers(world, patched, monkeypatch)
    added.subtract(in_the_layers(world, model, monkeypatch))
    assert sum(added.values()) <= 6 * layers, added
    assert not any(added[name] for name in (*MATMULS, *SYNCS)), added
    assert added["aten.scaled_dot_product_attention"] == layers


def test_at_most_one_sync_a_step(world):
    """However many adapters; two more for each window in a run, to look up its ends."""
    base = in_all(world, world.model)
    whole = in_all(world, world.apply(world.model, world.adapter, world.prompt))
    window = world.apply(world.model, world.adapter, world.prompt, end_at=0.5)
    two_windows = in_all(world, world.apply(window, world.adapter, world.prompt, start_at=0.5))
    assert sum(whole[name] - base[name] for name in SYNCS) == 0
    lookups = in_lookups(world)
    assert 0 < sum(two_windows[name] - base[name] for name in SYNCS) <= STEPS + 4 * lookups


@pytest.mark.parametrize("over", ["steps", "frames"])
def test_a_schedule_costs_no_call_in_a_layer_and_one_sync_a_step(pack, world, monkeypatch, over):
    made = pack.WeightSchedule.execute(over, "1, 0.5").args[0]
    patched = world.apply(world.model, world.adapter, world.prompt, weight_schedule=made)
    added = in_the_layers(world, patched, monkeypatch)
    added.subtract(in_the_layers(world, world.model, monkeypatch))
    assert sum(added.values()) <= 6 * 16 and not any(added[name] for name in (*MATMULS, *SYNCS)), added
    whole, base = in_all(world, patched), in_all(world, world.model)
    assert sum(whole[name] - base[name] for name in SYNCS) <= (STEPS if over == "steps" else 0)


def test_a_record_waits_for_the_device_once_a_step(pack, world, monkeypatch):
    recorded = pack.RecordAttentionMap.execute(world.apply(world.model, world.adapter, world.prompt)).args[0]
    added = in_the_layers(world, recorded, monkeypatch)
    added.subtract(in_the_layers(world, world.model, monkeypatch))
    assert not any(added[name] for name in (*MATMULS, *SYNCS)), added
    whole, base = in_all(world, recorded), in_all(world, world.model)
    assert sum(whole[name] - base[name] for name in SYNCS) <= STEPS


def in_lookups(world):
    """Syncs of one percent_to_sigma."""
    with Counting() as counting:
        world.model.get_model_object("model_sampling").percent_to_sigma(0.5)
    return sum(counting.calls[name] for name in SYNCS)
