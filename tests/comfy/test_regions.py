"""Regional prompts, areas, frames and odd grids: the mask and the branches stay with the rows they belong to."""

from __future__ import annotations

import inspect

import pytest
import torch

LEFT, RIGHT = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
LEFT[..., :8] = 1.0
RIGHT[..., 8:] = 1.0


@pytest.fixture
def terms(pack, monkeypatch):
    """(key of the adapter, block, what it adds [B, h, w]) of every attention to the image."""
    found = []
    original = pack.patch.SitePatch.image_term

    def image_term(self, query, step, options):
        term, gate = original(self, query, step, options)
        grid = tuple(options["activations_shape"][-2:])
        acting = term if gate is None else term * gate
        found.append((self.application.key, options["block"], acting.unflatten(1, grid).abs().sum(-1)))
        return term, gate

    monkeypatch.setattr(pack.patch.SitePatch, "image_term", image_term)
    return found


def couple(model, *, in_place):
    """Regional prompts as other packs make them: two queries for each positive one, averaged after the attention."""

    def grow(n, context, value, options):
        entries = options["cond_or_uncond"]
        times = [2 if entry == 0 else 1 for entry in entries]
        options["before"] = list(entries)
        declared = [entry for entry, count in zip(entries, times, strict=True) for _ in range(count)]

        def repeat(x):
            chunks = zip(x.chunk(len(times)), times, strict=True)
            return torch.cat([chunk for chunk, count in chunks for _ in range(count)])

        grown = repeat(n), repeat(context), repeat(value)
        if in_place:
            entries[:] = declared
        else:
            options["cond_or_uncond_couple"] = declared
        return grown

    def shrink(n, options):
        before = options.pop("before")
        options["cond_or_uncond"][:] = before
        chunks = list(n.chunk(sum(2 if entry == 0 else 1 for entry in before)))
        return torch.cat([(chunks.pop(0) + chunks.pop(0)) / 2 if entry == 0 else chunks.pop(0) for entry in before])

    clone = model.clone()
    clone.set_model_attn2_patch(grow)
    clone.set_model_attn2_output_patch(shrink)
    return clone


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_grows_in_the_layers(world, in_place, masked):
    mask = torch.cat([LEFT, RIGHT]) if masked else None
    model = couple(world.model, in_place=in_place)
    torch.testing.assert_close(world.sample(model), world.base, atol=1e-3, rtol=1e-3)
    want = world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=mask), batch=2)
    got = world.sample(world.apply(model, world.adapter, world.prompt, attn_mask=mask), batch=2)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_a_batch_that_grows_into_something_else_is_refused(pack, world):
    model = world.model.clone()
    model.set_model_attn2_patch(lambda n, c, v, o: tuple(torch.cat([x, x[:1]]) for x in (n, c, v)))
    with pytest.raises(pack.core.AdapterError, match="3 rows does not divide into 2"):
        world.sample(world.apply(model, world.adapter, world.prompt))


def in_area(positive, **options):
    return [[positive[0][0], {**positive[0][1], "strength": 1.0, **options}]]


@pytest.mark.parametrize(
    "options",
    [
        {"area": (16, 8, 0, 8)},
        {"area": ("percentage", 1.0, 0.5, 0.0, 0.5)},
        {"mask": RIGHT, "set_area_to_bounds": True},
    ],
)
def test_a_mask_is_cropped_to_the_area_of_a_cond(world, terms, options):
    positive, negative = world.conds()
    conds = [*positive, *in_area(positive, **options)]
    for mask, acts in ((LEFT, False), (RIGHT, True)):
        terms.clear()
        patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=mask)
        world.sample(patched, positive=conds, negative=negative, steps=1)
        half = [term for _, block, term in terms if block == ("input", 1) and term.shape[-1] < 16]
        assert half
        for term in half:
            # One column next to the edge may blend.
            assert bool(term[..., 1:].all()) if acts else not term[..., 1:].any()


def test_areas_of_one_size_in_one_batch(world, terms):
    positive, negative = world.conds()
    conds = [*in_area(positive, area=(16, 8, 0, 0)), *in_area(positive, area=(16, 8, 0, 8))]
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)
    world.sample(patched, positive=conds, negative=negative, steps=1, cfg=1.0)
    rows = [row[..., 1:-1] for _, block, term in terms if block == ("input", 1) for row in term]
    assert sorted(bool(row.any()) for row in rows) == [False, True]
    assert [bool(row.all()) for row in rows] == [bool(row.any()) for row in rows]


def deep_shrink(model, factor=1.5):
    import comfy_extras.nodes_model_downscale as extras

    node = extras.PatchModelAddDownscale
    arguments = (model, 3, factor, 0.0, 1.0, True, "bicubic", "bicubic")
    return node.execute(*arguments).args[0] if hasattr(node, "execute") else node().patch(*arguments)[0]


@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_deep_shrink_keeps_the_masks_of_a_batch(world, factor):
    model = deep_shrink(world.model, factor)
    masks = torch.cat([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    both = world.sample(world.apply(model, world.adapter, world.prompt, attn_mask=masks), batch=2, size=(24, 24))
    plain = world.sample(world.apply(model, world.adapter, world.prompt), batch=2, size=(24, 24))
    base = world.sample(model, batch=2, size=(24, 24))
    torch.testing.assert_close(both[0], base[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both[1], plain[1], atol=1e-3, rtol=1e-3)


def test_context_windows_take_their_own_masks(world):
    import comfy.context_windows
    import comfy_extras.nodes_context_windows as extras

    node = extras.ContextWindowsManualNode
    arguments = {
        "context_length": 2,
        "context_overlap": 0,
        "context_schedule": comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "flat",
        "dim": 0,
    }
    if "freenoise" not in inspect.signature(node.execute).parameters:
        pytest.skip("the windows of this ComfyUI do not run over a batch of images")
    arguments["freenoise"] = False

    def windowed(model):
        return world.sample(node.execute(model, **arguments).args[0], batch=4)

    masks = torch.cat([torch.zeros(2, 16, 16), torch.ones(2, 16, 16)])
    got = windowed(world.apply(world.model, world.adapter, world.prompt, attn_mask=masks))
    torch.testing.assert_close(got[:2], windowed(world.model)[:2], atol=1e-3, rtol=1e-3)
    plain = windowed(world.apply(world.model, world.adapter, world.prompt))
    torch.testing.assert_close(got[2:], plain[2:], atol=1e-3, rtol=1e-3)


def test_a_context_window_in_the_options(world):
    """A window of the batch's dimension says which images it has; one of another dimension does not."""
    from comfy.context_windows import IndexListContextWindow

    masks = torch.cat([LEFT, torch.ones(1, 16, 16)])
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    options = patched.model_options["transformer_options"]
    sizes = {"total_frames": 2} if "total_frames" in inspect.signature(IndexListContextWindow).parameters else {}
    options["context_window"] = IndexListContextWindow([1], dim=0, **sizes)
    unmasked = world.sample(world.apply(world.model, world.adapter, world.prompt))
    torch.testing.assert_close(world.sample(patched), unmasked, atol=1e-3, rtol=1e-3)
    options["context_window"] = IndexListContextWindow([1], dim=2, **sizes)
    left = world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT))
    assert torch.equal(world.sample(patched), left) and not torch.allclose(left, unmasked, atol=0.1)


def test_stacked_adapters_keep_their_own_masks(world, terms):
    other = world.new_adapter(world.model, seed=31, name="b")
    first = world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)
    both = world.apply(first, other, world.new_prompt(other), attn_mask=RIGHT)
    world.sample(both, steps=1)
    acting = {}
    for key, block, term in terms:
        if block == ("input", 1):
            acting.setdefault(key, []).append([bool(half.any()) for half in (term[..., :7], term[..., 9:])])
    assert sorted(half for halves in acting.values() for half in halves) == [[False, True], [True, False]]
    assert len(acting) == 2
