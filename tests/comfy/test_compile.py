"""torch.compile, as ComfyUI's own node applies it, gives the same picture; also when what is applied changes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def compiled(comfyui):
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
