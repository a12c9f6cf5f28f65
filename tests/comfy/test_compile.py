"""torch.compile, as ComfyUI's own node applies it, gives the same picture; also when what is applied changes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def compiled(pack):
    """Compile a MODEL with the eager backend and, where ComfyUI has it, its own filter of guards."""
    import comfy_extras.nodes_torch_compile as extras
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        clone = model.clone()
        keep = getattr(extras, "skip_torch_compile_dict", None)
        options = {"guard_filter_fn": keep} if keep else None
        set_torch_compile_wrapper(model=clone, backend="eager", options=options)
        return clone

    torch._dynamo.reset()
    pack.run._compiled.clear()
    yield compiled
    torch._dynamo.reset()


def test_the_same_picture(world, compiled):
    patched = world.apply(world.model, world.adapter, world.prompt)
    want = world.sample(patched)
    torch.testing.assert_close(world.sample(compiled(patched)), want, atol=1e-3, rtol=1e-4)
    after = world.apply(compiled(world.model), world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(after), want, atol=1e-3, rtol=1e-4)


def test_another_prompt_window_and_mask_are_not_frozen(world, compiled):
    """The same compiled model with other values in the same places."""
    model = compiled(world.model)
    other = world.new_prompt(world.adapter, seed=21)
    mask = torch.ones(1, 16, 16)
    mask[..., :8] = 0.0
    for options in (
        {"image_prompt": world.prompt},
        {"image_prompt": other},
        {"image_prompt": other, "end_at": 0.5},
        {"image_prompt": other, "start_at": 0.5},
        {"image_prompt": other, "attn_mask": mask},
    ):
        prompt = options.pop("image_prompt")
        want = world.sample(world.apply(world.model, world.adapter, prompt, **options), steps=3)
        got = world.sample(world.apply(model, world.adapter, prompt, **options), steps=3)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_a_run_that_begins_before_its_window(world, compiled):
    """The first step of the graph is one in which the adapter does not act."""
    options = {"start_at": 0.5}
    want = world.sample(world.apply(world.model, world.adapter, world.prompt, **options), steps=3)
    assert not torch.allclose(want, world.sample(world.model, steps=3), atol=1.0)
    got = world.sample(world.apply(compiled(world.model), world.adapter, world.prompt, **options), steps=3)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("compile_first", [True, False])
def test_other_layers_shapes_and_adapters_are_not_frozen(world, compiled, compile_first):
    """What is applied changes more than its values: a graph that ignores the options would not see it."""
    three = world.new_prompt(world.adapter, images=3)
    style = {"weight_type": "style transfer"}
    once = compiled(world.model)

    def both(model):
        return world.apply(world.apply(model, world.adapter, world.prompt), world.adapter, three, weight=0.5)

    for change in (
        lambda model: model,
        lambda model: world.apply(model, world.adapter, world.prompt),
        lambda model: world.apply(model, world.adapter, three),
        lambda model: world.apply(model, world.adapter, three, **style),
        lambda model: world.apply(model, world.adapter, world.prompt),
        both,
        lambda model: world.apply(model, world.adapter, world.prompt, weight=0.0),
    ):
        want = world.sample(change(world.model), steps=1)
        got = world.sample(change(once) if compile_first else compiled(change(world.model)), steps=1)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_the_same_application_is_compiled_once(world, compiled, monkeypatch):
    resets = []
    original = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(1), original()))
    model = compiled(world.model)
    for prompt in (world.prompt, world.new_prompt(world.adapter, seed=21)):
        world.sample(world.apply(model, world.adapter, prompt), steps=1)
    assert len(resets) <= 1


def shrink(model):
    """A part of the UNet on a grid that no level has; within one graph, unlike Deep Shrink, which reads the sigma."""

    def smaller(h, options):
        return torch.nn.functional.interpolate(h, size=(10, 10)) if options["block"] == ("input", 3) else h

    clone = model.clone()
    clone.set_model_input_block_patch(smaller)
    clone.set_model_output_block_patch(
        lambda h, skip, options: (torch.nn.functional.interpolate(h, size=skip.shape[-2:]), skip)
    )
    return clone


@pytest.mark.parametrize(
    "options", [{"start_at": 0.4, "end_at": 0.5}, {"start_at": 0.5}, {"end_at": 0.5, "attn_mask": torch.ones(1, 8, 8)}]
)
def test_windows_on_grids_that_no_level_has(world, compiled, options):
    model = shrink(world.model)
    want = world.sample(world.apply(model, world.adapter, world.prompt, **options))
    got = world.sample(compiled(world.apply(model, world.adapter, world.prompt, **options)))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
