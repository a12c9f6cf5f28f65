"""torch.compile, as ComfyUI's own node applies it, gives the same image; also when what is applied changes."""

from __future__ import annotations

import shutil

import pytest
import torch

# Two attention layers of equal shapes: where the attention ends a graph, they are compiled as one function.
SMALL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": 0,
    "transformer_depth_output": [1, 0],
}


@pytest.fixture(scope="module")
def small(world):
    """A small model with its adapter and image prompts of one to five images."""
    model = world.new_model(**SMALL)
    adapter = world.new_adapter(model)
    prompts = {images: world.new_prompt(adapter, seed=images, images=images) for images in (1, 3, 5)}
    return model, adapter, prompts


@pytest.fixture
def compiled():
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


def ending_graphs(model):
    """The model with an attention that torch does not trace, as that of SageAttention and ComfyUI's split attention."""
    clone = model.clone()
    untraced = torch.compiler.disable(lambda attention, *args, **kwargs: attention(*args, **kwargs))
    clone.model_options["transformer_options"]["optimized_attention_override"] = untraced
    return clone


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def left_half():
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1.0
    return mask


def check(world, got, want, **settings):
    torch.testing.assert_close(world.sample(got, **settings), world.sample(want, **settings), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("attention", [lambda model: model, ending_graphs], ids=["traced", "ending graphs"])
def test_whatever_changes_is_not_frozen(world, small, pack, compiled, attention):
    plain, adapter, prompts = small
    plain = attention(plain)
    once = compiled(plain)

    def apply(images=1, **options):
        return lambda model: world.apply(model, adapter, prompts[images], **options)

    def stacked(model):
        return apply(3, weight=0.5)(apply()(model))

    def one_layer(model):
        weights = [pack.core.LayerWeight(weight) for weight in (0.0, 1.0)]
        return pack.install.apply_prompt(model, adapter, prompts[1], node="Test", weights=weights)

    for change, settings in (
        (lambda model: model, {}),
        (apply(), {}),
        (apply(3), {}),
        (apply(attn_mask=left_half()), {}),
        (one_layer, {}),
        (apply(start_at=0.5), {"steps": 3}),
        (stacked, {}),
        (apply(), {"batch": 2, "size": (24, 16)}),
        (apply(weight=0.0), {}),
        (lambda model: model, {}),
        (apply(), {}),
    ):
        check(world, change(once), change(plain), **{"steps": 1, **settings})
    other = attention(world.new_model(seed=9, **SMALL))
    check(world, apply()(compiled(other)), apply()(other), steps=1)
    check(world, compiled(apply()(other)), apply()(other), steps=1)


def test_compiles_anew_only_for_another_kind(world, small, compiled):
    """Other images, weights, masks and windows run in the graphs that are there."""
    plain, adapter, prompts = small
    once, other = compiled(plain), world.new_prompt(adapter, seed=21)
    mask = left_half()

    def count(model, prompt, steps=1, **options):
        before = graphs()
        check(
            world,
            world.apply(model, adapter, prompt, **options),
            world.apply(plain, adapter, prompt, **options),
            steps=steps,
        )
        return graphs() - before

    assert count(once, prompts[1]) == 1
    assert count(once, other) == count(once, other, weight=0.5) == count(compiled(plain), other) == 0
    assert count(once, prompts[3]) == 1
    assert count(once, prompts[5]) == 0
    assert count(once, other, attn_mask=mask) == 1
    assert count(once, other, attn_mask=1 - mask) == 0
    assert count(once, other, steps=4, start_at=0.5) == 1  # the steps before the window
    assert count(once, other, steps=4, start_at=0.2, end_at=0.6) == 0


def test_graphs_of_others_stay(world, small, compiled):
    plain, adapter, prompts = small
    double = torch.compile(lambda x: x * 2, backend="eager")
    double(torch.ones(3))
    once = compiled(plain)
    check(world, once, plain, steps=1)
    check(world, world.apply(once, adapter, prompts[1]), world.apply(plain, adapter, prompts[1]), steps=1)
    before = graphs()
    double(torch.ones(3))
    check(world, once, plain, steps=1)
    assert graphs() == before


def test_more_kinds_than_torch_compiles_by_default(world, small, compiled):
    plain, adapter, prompts = small
    once = compiled(plain)
    with torch._dynamo.config.patch(recompile_limit=1):
        check(world, once, plain, steps=1)
        before = graphs()
        check(world, world.apply(once, adapter, prompts[1]), world.apply(plain, adapter, prompts[1]), steps=1)
        assert graphs() == before + 1
        assert torch._dynamo.config.recompile_limit == 1


def test_deep_shrink(world, small, compiled):
    """It reads the sigma of the step, which ends the graph in the middle of the UNet."""
    import comfy_extras.nodes_model_downscale as extras

    node = extras.PatchModelAddDownscale
    plain, adapter, prompts = small
    shrinking = node.execute(plain, 1, 1.6, 0.0, 0.5, True, "bicubic", "bicubic").args[0]
    want = world.apply(shrinking, adapter, prompts[1], attn_mask=left_half())
    assert not torch.allclose(world.sample(want, steps=2), world.sample(shrinking, steps=2), atol=1e-2)
    check(world, world.apply(compiled(shrinking), adapter, prompts[1], attn_mask=left_half()), want, steps=2)


def shrink(model):
    """A part of the UNet on a grid that no level has; within one graph, unlike Deep Shrink."""

    def smaller(h, options):
        return torch.nn.functional.interpolate(h, size=(10, 10)) if options["block"] == ("input", 0) else h

    clone = model.clone()
    clone.set_model_input_block_patch_after_skip(smaller)
    clone.set_model_output_block_patch(
        lambda h, skip, options: (torch.nn.functional.interpolate(h, size=skip.shape[-2:]), skip)
    )
    return clone


@pytest.mark.parametrize("options", [{"start_at": 0.4, "end_at": 0.5}, {"end_at": 0.5, "attn_mask": left_half()}])
def test_windows_on_grids_that_no_level_has(world, small, compiled, options):
    plain, adapter, prompts = small
    patched = world.apply(shrink(plain), adapter, prompts[1], **options)
    check(world, compiled(patched), patched, steps=3)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on the CPU")


@needs_compiler
def test_the_node_with_inductor(world, small, compiled):
    import comfy_extras.nodes_torch_compile as extras

    plain, adapter, prompts = small
    once = extras.TorchCompileModel.execute(plain, "inductor").args[0]
    before = graphs()
    check(world, world.apply(once, adapter, prompts[1]), world.apply(plain, adapter, prompts[1]), steps=1)
    assert graphs() == before + 1


@needs_compiler
def test_inductor_gets_mode_and_options(pack, compiled):
    def scaled(mode, **options):
        backend = pack.graphs.OwnGraphs("inductor", mode, options, None)
        return torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))

    assert scaled(None).tolist() == scaled("default").tolist() == [3.0, 3.0, 3.0]
    assert scaled("reduce-overhead").tolist() == scaled(None, epilogue_fusion=False).tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(Exception, match="no_such_option"):
        scaled(None, no_such_option=1)
    with pytest.raises(Exception, match="no_such_mode"):
        scaled("no_such_mode")


def test_a_compilation_of_another_kind_is_refused(world, small, pack, compiled):
    import comfy.patcher_extension

    plain, adapter, prompts = small
    once = compiled(plain)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    once.remove_wrappers_with_key(kind, "torch.compile")
    once.add_wrapper_with_key(kind, "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    with pytest.raises(pack.core.AdapterError, match="compiled in a way that Apply IP Adapter does not know"):
        world.sample(world.apply(once, adapter, prompts[1]), steps=1)
