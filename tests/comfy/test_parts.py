"""Nodes that call the model or its layers with parts: tiles, single images, spatial context windows, merged queries."""

from __future__ import annotations

import inspect

import pytest
import torch

LEFT = torch.cat([torch.ones(1, 16, 8), torch.zeros(1, 16, 8)], dim=2)
CLOSE = {"atol": 1e-3, "rtol": 1e-3}


def wrapped(model, parts, at_once=1, order=lambda rows: rows):
    """The model, called with `at_once` of the `parts` of its input in a batch: all rows of a part together, as in Tiled
    Diffusion, but for another `order` of them.
    """

    def call(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        made = torch.zeros_like(x)
        for start in range(0, len(parts), at_once):
            some = parts[start : start + at_once]
            pieces = [x[part] for part in some]
            rows = torch.cat([torch.arange(len(x))[part[0]] for part in some])
            turned = order(torch.arange(len(rows)))
            rows = rows[turned]
            given = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in c.items()}
            out = torch.empty_like(torch.cat(pieces))
            out[turned] = apply_model(torch.cat(pieces)[turned], t[rows], **given)
            for part, piece in zip(some, out.split([len(piece) for piece in pieces]), strict=True):
                made[part] = piece
        return made

    clone = model.clone()
    clone.set_model_unet_function_wrapper(call)
    return clone


def tiles(width=8):
    return [(slice(None), slice(None), slice(None), slice(left, left + width)) for left in range(0, 16, width)]


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_in_one_batch_are_those_of_single_calls(pack, world, batch):
    prompts = {"one": world.prompt, "each": world.new_prompt(world.adapter, images=batch)}
    prompts["each"] = one_each(pack, prompts["each"])
    for prompt in prompts.values():
        patched = world.apply(world.model, world.adapter, prompt)
        single, both = (world.sample(wrapped(patched, tiles(4), count), batch=batch) for count in (1, 4))
        torch.testing.assert_close(both, single, **CLOSE)
        assert not torch.allclose(single, world.sample(wrapped(world.model, tiles(4)), batch=batch), atol=0.1)


@pytest.mark.parametrize("same_texts", [False, True])
def test_tiles_by_chunk(world, same_texts):
    """Where the texts of both branches are the same, only the order of Tiled Diffusion is known of tiles."""
    patched = world.apply(world.model, world.adapter, world.prompt)
    positive, negative = world.conds()
    texts = {"positive": positive, "negative": positive if same_texts else negative}
    single = world.sample(wrapped(patched, tiles(4)), **texts)

    def by_chunk(rows):
        return rows.reshape(4, -1).T.flatten()

    order = {} if same_texts else {"order": by_chunk}
    torch.testing.assert_close(world.sample(wrapped(patched, tiles(4), 4, **order), **texts), single, **CLOSE)


def test_copies_of_the_whole_latent(world):
    """Those of a sampler come chunk by chunk."""
    whole = [(slice(None),) * 4] * 2
    for texts in ({}, dict.fromkeys(("positive", "negative"), world.conds()[0])):
        patched = world.apply(world.model, world.adapter, world.prompt)
        want = world.sample(patched, **texts)
        got = world.sample(wrapped(patched, whole, 2, order=lambda rows: rows.reshape(2, -1).T.flatten()), **texts)
        torch.testing.assert_close(got, want, **CLOSE)


def test_tiles_in_another_order_are_refused(pack, world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    with pytest.raises(
        pack.core.AdapterError, match=r"8 rows for 2 conditionings, 4 times as many .* order is not known"
    ):
        world.sample(wrapped(patched, tiles(4), 4, order=lambda rows: torch.tensor([0, 1, 3, 2, 4, 5, 6, 7])))


def test_a_mask_over_tiles_is_refused(pack, world):
    masked = world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)
    for count in (1, 2):
        with pytest.raises(pack.core.AdapterError, match=r"the 16 x 16 latent in parts of 8 x 16, .* attn_mask needs"):
            world.sample(wrapped(masked, tiles(), count))


def one_each(pack, prompt):
    return pack.types.ImagePrompt(prompt.positive, adapter=prompt.adapter, one_each=True)


def test_single_images_of_a_batch(pack, world):
    """One prompt for all does not need to know which image it is for; one for each does."""
    images = [(slice(row, None, 2),) for row in (0, 1)]
    patched = world.apply(world.model, world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(wrapped(patched, images), batch=2), world.sample(patched, batch=2), **CLOSE)
    masks = torch.cat([LEFT, torch.ones(1, 16, 16)])
    schedule = pack.schedule.WeightSchedule("frames", (1.0, 0.5))
    each = one_each(pack, world.new_prompt(world.adapter, images=2))
    for prompt, options in (
        (each, {}),
        (world.prompt, {"attn_mask": masks}),
        (world.prompt, {"weight_schedule": schedule}),
    ):
        patched = world.apply(world.model, world.adapter, prompt, **options)
        with pytest.raises(pack.core.AdapterError, match=r"1 of 2 images, and does not say which"):
            world.sample(wrapped(patched, images), batch=2)


def in_windows(model, dim, closed_loop=False, overlap=0):
    """ComfyUI's Context Windows over the rows (2) or columns (3) of the latent, 8 each."""
    import comfy.context_windows
    import comfy_extras.nodes_context_windows as extras

    node = extras.ContextWindowsManualNode
    arguments = {
        "context_length": 8,
        "context_overlap": overlap,
        "context_schedule": comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": closed_loop,
        "fuse_method": "flat",
        "dim": dim,
    }
    if "freenoise" in inspect.signature(node.execute).parameters:
        arguments["freenoise"] = False
    return node.execute(model, **arguments).args[0]


@pytest.mark.parametrize("dim", [2, 3])
def test_a_mask_lies_over_all_windows(world, dim):
    """Newer versions put the first row or column into every window, so the first window alone is that of its half."""

    def halves(**options):
        patched = world.apply(world.model, world.adapter, world.prompt, **options)
        return world.sample(in_windows(patched, dim)).split(8, dim)

    everywhere, nowhere = halves(), world.sample(in_windows(world.model, dim)).split(8, dim)
    left, right = (halves(attn_mask=mask if dim == 3 else mask.mT) for mask in (LEFT, LEFT.flip(-1)))
    torch.testing.assert_close(left[0], everywhere[0], **CLOSE)
    torch.testing.assert_close(right[0], nowhere[0], **CLOSE)
    assert not torch.allclose(left[1], everywhere[1], atol=0.1)
    assert not torch.allclose(right[1], nowhere[1], atol=0.1)


def test_a_map_of_windows(pack, world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    for dim, closed_loop in ((2, False), (3, False), (3, True)):
        model, record = pack.RecordAttentionMap.execute(in_windows(patched, dim, closed_loop, overlap=2)).args
        world.sample(model)
        heat = record.heat("all", 0, 2)
        assert float(heat.min()) > 0.05, (dim, closed_loop)


def test_a_map_of_what_is_not_known_is_refused(pack, world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    model, _ = pack.RecordAttentionMap.execute(patched).args
    with pytest.raises(pack.core.AdapterError, match=r"another node samples parts \(2 of 8 x 16\) of the 16 x 16"):
        world.sample(wrapped(model, tiles()))


@pytest.mark.parametrize("options", [{}, {"attn_mask": LEFT}])
def test_merged_queries(pack, world, options):
    """A patch of another pack that merges the queries of the cross-attention: only a mask needs each of them."""
    kept = []

    def merge(query, key, value, _):
        kept.append(query.shape[1])
        return query[:, ::2], key, value

    def unmerge(output, _):
        return output.repeat_interleave(2, 1)[:, : kept.pop()]

    patched = world.apply(world.model, world.adapter, world.prompt, **options)
    patched.set_model_attn2_patch(merge)
    patched.set_model_attn2_output_patch(unmerge)
    if not options:
        assert world.sample(patched).isfinite().all()
        return
    with pytest.raises(pack.core.AdapterError, match="128 queries for a grid of 16 x 16: another node merges them"):
        world.sample(patched)
