"""Positive tokens act on positive conds and negative tokens on negative ones, whatever the guider's order."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def seen(pack, monkeypatch):
    """For every call of the model: cond_or_uncond and the branch of each row."""
    calls = []
    original = pack.application.Application.__call__

    def call(self, executor, x, t, *args, **kwargs):
        def inner(*inner_args, **inner_kwargs):
            options = inner_args[5]
            calls.append((list(options["cond_or_uncond"]), list(options[self.key].rows)))
            return executor(*inner_args, **inner_kwargs)

        inner.class_obj = executor.class_obj
        return original(self, inner, x, t, *args, **kwargs)

    monkeypatch.setattr(pack.application.Application, "__call__", call)
    return calls


def run_guider(guider, steps=2, cfg_latent=(8, 8)):
    import comfy.samplers

    latent = torch.zeros(1, 4, *cfg_latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(6))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, seed=7)


def rows_by_index(calls):
    """index in the guider's list -> branches seen for it."""
    found = {}
    for chunks, rows in calls:
        per_chunk = len(rows) // len(chunks)
        for place, index in enumerate(chunks):
            found.setdefault(index, set()).update(rows[place * per_chunk : (place + 1) * per_chunk])
    return found


def test_cfg(world, seen):
    world.sample(world.apply(world.model, world.adapter, world.prompt), batch=2)
    assert rows_by_index(seen) == {0: {0}, 1: {1}}


def test_dual_cfg(world, seen):
    """Its list is negative, middle, positive."""
    import comfy_extras.nodes_custom_sampler as extras

    guider = extras.Guider_DualCFG(world.apply(world.model, world.adapter, world.prompt))
    positive, negative = world.conds()
    middle, _ = world.conds(seed=11)
    guider.set_conds(positive, middle, negative)
    guider.set_cfg(3.0, 2.0)
    run_guider(guider)
    assert rows_by_index(seen) == {0: {1}, 1: {0}, 2: {0}}


def test_dual_cfg_with_an_area(world, seen):
    """ComfyUI copies the area cond into all lists: the copy in the negative list is negative."""
    import comfy_extras.nodes_custom_sampler as extras

    guider = extras.Guider_DualCFG(world.apply(world.model, world.adapter, world.prompt))
    positive, negative = world.conds()
    area = [[positive[0][0], {**positive[0][1], "area": (4, 8, 0, 0), "strength": 1.0}]]
    middle, _ = world.conds(seed=11)
    guider.set_conds([*positive, *area], middle, negative)
    guider.set_cfg(3.0, 2.0)
    run_guider(guider)
    assert rows_by_index(seen) == {0: {1}, 1: {0}, 2: {0}}
    assert len(seen) == 4  # two calls a step: the whole and the area


def test_perp_neg(world, seen):
    """Positive, negative and empty: both of the latter are negative."""
    import comfy_extras.nodes_perpneg as extras

    guider = extras.Guider_PerpNeg(world.apply(world.model, world.adapter, world.prompt))
    positive, negative = world.conds()
    guider.set_conds(positive, negative, world.conds(seed=12)[0])
    guider.set_cfg(3.0, 1.0)
    run_guider(guider)
    assert rows_by_index(seen) == {0: {0}, 1: {1}, 2: {1}}


def test_sag_runs_the_negative_alone_as_index_zero(world, seen):
    import comfy_extras.nodes_sag as extras

    patched = world.apply(world.model, world.adapter, world.prompt)
    node = extras.SelfAttentionGuidance
    if hasattr(node, "execute"):
        patched = node.execute(patched, 0.5, 2.0).args[0]
    else:
        patched = node().patch(patched, 0.5, 2.0)[0]
    world.sample(patched, size=(16, 16))
    alone = [rows for chunks, rows in seen if chunks == [0]]
    assert alone and all(rows == [1] for rows in alone)


def test_only_one_branch(world, seen):
    world.sample(world.apply(world.model, world.adapter, world.prompt), cfg=1.0)
    assert {tuple(rows) for _, rows in seen} == {(0,)}


def test_split_and_permuted_chunks_give_the_same_image(world, monkeypatch):
    """As when memory is short: every cond in its own call, and in the other order."""
    import comfy.samplers

    patched = world.apply(world.model, world.adapter, world.prompt)
    together = world.sample(patched)
    original = comfy.samplers.can_concat_cond
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: a is b)
    torch.testing.assert_close(world.sample(patched), together, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", original)
    positive, negative = world.conds()
    combined = [*positive, *world.conds(seed=13)[0]]
    assert torch.isfinite(world.sample(patched, positive=combined, negative=negative)).all()


def test_chunks_in_the_other_order_give_the_same_image(world, seen):
    """ComfyUI batches negative and positive in this order; a node that turns it around changes nothing."""
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    want = world.sample(patched, batch=2)
    assert {tuple(chunks) for chunks, _ in seen} == {(1, 0)}
    seen.clear()

    def turn(x):
        return torch.cat(x.chunk(2)[::-1])

    def turned(forward, call):
        options = dict(call["c"]["transformer_options"])
        options |= {name: options[name][::-1] for name in ("cond_or_uncond", "uuids")}
        conditioning = {name: turn(x) if torch.is_tensor(x) else x for name, x in call["c"].items()}
        conditioning["transformer_options"] = options
        return turn(forward(turn(call["input"]), turn(call["timestep"]), **conditioning))

    patched.set_model_unet_function_wrapper(turned)
    torch.testing.assert_close(world.sample(patched, batch=2), want, atol=1e-3, rtol=1e-3)
    assert {tuple(chunks) for chunks, _ in seen} == {(0, 1)}
    assert rows_by_index(seen) == {0: {0}, 1: {1}}


def test_combined_conds(world, seen):
    positive, negative = world.conds()
    combined = [*positive, *world.conds(seed=13)[0]]
    world.sample(world.apply(world.model, world.adapter, world.prompt), positive=combined, negative=negative)
    assert rows_by_index(seen) == {0: {0}, 1: {1}}
    assert any(len(chunks) == 3 for chunks, _ in seen)


def test_areas_share_a_uuid(world, seen):
    """ComfyUI copies an area cond into the other list, uuid and all."""
    positive, negative = world.conds()
    area = [[positive[0][0], {**positive[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    world.sample(world.apply(world.model, world.adapter, world.prompt), positive=[*positive, *area], negative=negative)
    assert rows_by_index(seen) == {0: {0}, 1: {1}}


def test_positive_tokens_change_only_the_positive_branch(pack, world):
    """With the same prompt but other negative tokens, cfg 1 gives the same image."""
    import dataclasses

    negative = pack.types.EncodedImages(torch.randn_like(world.prompt.positive.image))
    prompt = dataclasses.replace(world.prompt, negative=negative)
    one = world.apply(world.model, world.adapter, world.prompt)
    two = world.apply(world.model, world.adapter, prompt)
    assert torch.equal(world.sample(one, cfg=1.0), world.sample(two, cfg=1.0))
    assert not torch.equal(world.sample(one), world.sample(two))


def test_swapped_layers_push_the_negative_branch(world):
    """ "style transfer precise": in the composition layers the positive tokens act in the negative branch."""
    patched = world.apply(world.model, world.adapter, world.prompt, weight_type="style transfer precise")
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    pair = patches["input", 8, 0].application.pairs["input", 8, 0]  # transformer 5 of SD1.5
    assert not pair.value[0].any() and pair.value[1].any()
    plain = world.apply(world.model, world.adapter, world.prompt, weight_type="style transfer")
    assert torch.equal(world.sample(patched, cfg=1.0), world.sample(plain, cfg=1.0))
    assert not torch.equal(world.sample(patched), world.sample(plain))
