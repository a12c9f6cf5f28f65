"""Apply IP Adapter on tiny random UNets, sampled by ComfyUI itself."""

from __future__ import annotations

import copy

import pytest
import torch


def patches(model):
    return model.model_options["transformer_options"]["patches_replace"]["attn2"]


def held(model):
    """Keys and values of all layers."""
    return [part for patch in patches(model).values() for part in patch.application.pairs[patch.place]]


@pytest.mark.parametrize(("family", "count"), [("sd15", 16), ("sdxl", 70)])
def test_every_site_fires(pack, world, monkeypatch, family, count):
    model = world.new_model(family)
    adapter = world.new_adapter(model)
    fired = []
    original = pack.patch.SitePatch.image_term

    def image_term(self, query, step, options):
        fired.append((*options["block"], options["block_index"]))
        return original(self, query, step, options)

    monkeypatch.setattr(pack.patch.SitePatch, "image_term", image_term)
    patched = world.apply(model, adapter, world.new_prompt(adapter))
    base, changed = world.sample(model, steps=1), world.sample(patched, steps=1)
    assert len(set(fired)) == len(patches(patched)) == count
    assert sum(block[0] == "middle" for block in set(fired)) == {"sd15": 1, "sdxl": 10}[family]
    assert not torch.equal(base, changed)
    assert torch.isfinite(changed).all()


def test_weight_zero_is_no_adapter(world):
    patched = world.apply(world.model, world.adapter, world.prompt, weight=0.0)
    assert torch.equal(world.sample(patched), world.base)
    silent = world.new_prompt(world.adapter, weight=0.0)
    assert torch.equal(world.sample(world.apply(world.model, world.adapter, silent)), world.base)


def test_the_input_model_stays_as_it_was(world):
    before = copy.copy(world.model.model_options["transformer_options"])
    first = world.sample(world.apply(world.model, world.adapter, world.prompt))
    assert world.model.model_options["transformer_options"] == before
    assert not world.model.wrappers
    assert torch.equal(world.sample(world.model), world.base)
    assert torch.equal(world.sample(world.apply(world.model, world.adapter, world.prompt)), first)


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (24, 16), (7, 18)])
def test_masks_of_one_and_zero(world, size):
    patched = world.apply(world.model, world.adapter, world.prompt)
    ones = world.apply(world.model, world.adapter, world.prompt, attn_mask=torch.ones(1, 50, 70))
    half = torch.stack([torch.zeros(50, 70), torch.ones(50, 70)])  # nowhere for the first of two images
    zeros = world.apply(world.model, world.adapter, world.prompt, attn_mask=half)
    # A resized mask of ones is one up to rounding.
    torch.testing.assert_close(world.sample(ones, size=size), world.sample(patched, size=size), atol=1e-3, rtol=1e-4)
    first, second = world.sample(zeros, size=size, batch=2)
    base = world.sample(world.model, size=size, batch=2)
    assert torch.equal(first, base[0]) and not torch.allclose(second, base[1], atol=0.1)


@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_a_half_mask_acts_on_its_half_of_every_grid(pack, world, monkeypatch, size):
    terms = []
    original = pack.patch.SitePatch.image_term

    def image_term(self, query, step, options):
        term, gate = original(self, query, step, options)
        terms.append((term * gate).unflatten(1, tuple(options["activations_shape"][-2:])))
        return term, gate

    monkeypatch.setattr(pack.patch.SitePatch, "image_term", image_term)
    mask = torch.zeros(1, 144, 144)
    mask[..., 72:] = 1.0
    world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=mask), size=size, steps=1)
    assert len(terms) >= 16
    for term in terms:
        width = term.shape[2]
        assert not term[:, :, : (width - 1) // 2].any()
        assert term[:, :, width // 2 + 1 :].abs().sum(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_and_a_schedule_in_half_precision(pack, world, dtype):
    """A sampler's latents are fp32 whatever the model calculates in."""
    model, options = world.new_model(dtype=dtype), {"attn_mask": torch.zeros(1, 16, 16)}
    options["attn_mask"][..., :8] = 1.0
    for more in ({}, {"weight_schedule": pack.WeightSchedule.execute("steps", "1, 0.5").args[0]}):
        want = world.sample(world.apply(world.model, world.adapter, world.prompt, **options, **more))
        got = world.sample(world.apply(model, world.adapter, world.prompt, **options, **more)).float()
        effect = (want - world.base).abs().mean()
        assert (got - want).abs().mean() < effect * {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]


def test_a_batch_of_masks_gives_each_image_its_own(world):
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    patched = world.apply(world.model, world.adapter, world.prompt)
    both = world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=masks), batch=2)
    torch.testing.assert_close(both[0], world.sample(world.model, batch=2)[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(both[1], world.sample(patched, batch=2)[1], atol=1e-3, rtol=1e-4)


def test_windows(world):
    always = world.sample(world.apply(world.model, world.adapter, world.prompt), steps=4)
    base = world.sample(world.model, steps=4)

    def window(start, end):
        patched = world.apply(world.model, world.adapter, world.prompt, start_at=start, end_at=end)
        return world.sample(patched, steps=4)

    late, early = window(0.5, 1.0), window(0.0, 0.5)
    assert not torch.equal(late, base) and not torch.equal(late, always)
    assert not torch.equal(early, base) and not torch.equal(early, always)
    assert torch.equal(window(0.4, 0.5), base)
    assert torch.equal(window(0.0, 1.0), always)


@pytest.fixture
def acting(pack, monkeypatch):
    """By the key of each adapter: whether it acts, in every call of the model."""
    found = {}
    original = pack.application.Application._is_active

    def is_active(self, *args):
        found.setdefault(self.key, []).append(original(self, *args))
        return found[self.key][-1]

    monkeypatch.setattr(pack.application.Application, "_is_active", is_active)
    return found


def expected(model, start, end, steps):
    """Whether the sigma of each step lies within the window."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:-1]
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    return [bool(last <= sigma <= first) for sigma in sigmas]


@pytest.mark.parametrize(("start", "end"), [(0.3, 1.0), (0.35, 1.0), (0.0, 0.35), (0.0, 0.3), (0.24, 0.69)])
def test_a_window_is_exact(world, acting, start, end):
    world.sample(world.apply(world.model, world.adapter, world.prompt, start_at=start, end_at=end), steps=10)
    (active,) = acting.values()
    want = expected(world.model, start, end, 10)
    assert active == want
    assert True in want and False in want


def test_stacked_adapters_keep_their_own_windows(world, acting):
    first = world.apply(world.model, world.adapter, world.prompt, start_at=0.35)
    world.sample(world.apply(first, world.adapter, world.prompt, start_at=0.1, end_at=0.6), steps=10)
    assert list(acting.values()) in (
        [expected(world.model, 0.35, 1.0, 10), expected(world.model, 0.1, 0.6, 10)],
        [expected(world.model, 0.1, 0.6, 10), expected(world.model, 0.35, 1.0, 10)],
    )


def test_batches(world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    both = world.sample(patched, batch=3)
    assert both.shape[0] == 3
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(both[:1], world.sample(patched), atol=1e-3, rtol=1e-3)


def test_several_images_and_cfg_one(world):
    prompt = world.new_prompt(world.adapter, images=3)
    tokens = world.tokens(world.adapter, prompt)
    assert tokens.positive.shape == tokens.negative.shape == (1, 12, 64)
    patched = world.apply(world.model, world.adapter, prompt)
    assert not torch.equal(world.sample(patched, cfg=1.0), world.sample(world.model, cfg=1.0))


def test_two_adapters_add_up_in_both_orders(world):
    other = world.new_adapter(world.model, seed=9, name="b")
    prompt = world.new_prompt(other, seed=8)

    def first_then_second():
        return world.sample(world.apply(world.apply(world.model, world.adapter, world.prompt), other, prompt))

    one = first_then_second()
    two = world.sample(world.apply(world.apply(world.model, other, prompt), world.adapter, world.prompt))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    alone = world.sample(world.apply(world.model, world.adapter, world.prompt))
    assert not torch.allclose(one, alone, atol=1e-3)
    assert torch.equal(first_then_second(), one)
    assert torch.equal(world.sample(world.model), world.base)


def test_each_application_has_its_own_window(world):
    twice = world.apply(world.model, world.adapter, world.prompt, start_at=0.4, end_at=0.5)
    twice = world.apply(twice, world.adapter, world.prompt)
    torch.testing.assert_close(
        world.sample(twice), world.sample(world.apply(world.model, world.adapter, world.prompt)), atol=0, rtol=0
    )
    assert len(twice.wrappers["apply_model"]) == 2


def test_foreign_patches_are_kept(world, spy):
    """attn2_patch runs before; an attn2_replace of a whole transformer (a pair key) is called by ours."""
    replaced = []

    def foreign(query, key, value, options):
        replaced.append(options["block"])
        return query * 0.5

    model = world.model.clone()
    calls = spy(model)
    model.set_model_attn2_replace(foreign, "input", 4)
    alone = world.sample(model, steps=1)
    once = len(replaced)
    patched = world.apply(model, world.adapter, world.prompt)
    assert not torch.equal(world.sample(patched, steps=1), alone)
    assert len(replaced) == 2 * once > 0
    assert len(calls) == 2 * 16 * once
    silent = world.apply(model, world.adapter, world.prompt, start_at=0.4, end_at=0.5)
    assert torch.equal(world.sample(silent, steps=1), alone)


def test_a_patch_of_a_whole_transformer_after_ours_is_refused(pack, world):
    """ComfyUI would never call it: it looks for the block's own patch, which is ours, first."""

    class Foreign:
        def __call__(self, query, key, value, options):
            return query * 0.5

    late = world.apply(world.model, world.adapter, world.prompt)
    late.set_model_attn2_replace(Foreign(), "input", 4)
    with pytest.raises(pack.core.AdapterError, match="before Apply IP Adapter"):
        world.sample(late, steps=1)
    early = world.model.clone()
    early.set_model_attn2_replace(Foreign(), "input", 4)
    alone = world.sample(early, steps=1)
    patched = world.apply(early, world.adapter, world.prompt, start_at=0.4, end_at=0.5)
    assert torch.equal(world.sample(patched.clone().clone(), steps=1), alone)
    assert torch.equal(world.sample(early, steps=1), alone)
    elsewhere = world.apply(world.model, world.adapter, world.prompt, weight_type="composition")
    elsewhere.set_model_attn2_replace(Foreign(), "input", 4)
    assert torch.isfinite(world.sample(elsewhere, steps=1)).all()


def test_clones_share_the_tensors(world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    clone = patched.clone().clone()
    for key, patch in patches(patched).items():
        assert patches(clone)[key] is patch
        assert copy.deepcopy(patch) is patch
    assert torch.equal(world.sample(clone), world.sample(patched))


def test_patches_pass_devices_on_to_the_one_before(pack, world):
    """Ours hold nothing: keys and values go to the device of each call. One of another pack may hold something."""

    class Other:
        device = "cpu"

        def __call__(self, query, key, value, options):
            return query

        def to(self, target):
            moved = Other()
            moved.device = target
            return moved

    patch = next(iter(patches(world.apply(world.model, world.adapter, world.prompt)).values()))
    assert patch.to(torch.float16) is patch.to(torch.device("meta")) is patch
    stacked = pack.patch.SitePatch(patch.application, patch.place, Other())
    moved = stacked.to("meta")
    assert moved.previous.device == "meta" and stacked.previous.device == "cpu"
    assert moved.application is patch.application


@pytest.mark.parametrize("scaling", ["V only", "K+V"])
def test_scalings(world, scaling):
    patched = world.apply(world.model, world.adapter, world.prompt, weight=0.7, embeds_scaling=scaling)
    assert not torch.equal(world.sample(patched), world.base)


@pytest.fixture(scope="module")
def wide(world):
    """A model whose widest layers have 320 channels, few blocks, an adapter and a prompt."""
    shape = {
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1] * 4,
    }
    with torch.inference_mode():
        model = world.new_model(width=160, **shape)
        adapter = world.new_adapter(model)
        return model, adapter, world.new_prompt(adapter)


@pytest.mark.parametrize("scaling", ["K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_scalings_with_a_penalty(pack, world, wide, scaling):
    patched = world.apply(*wide, weight=0.7, embeds_scaling=scaling)
    assert not torch.equal(world.sample(patched), world.sample(wide[0]))
    with pytest.raises(pack.core.AdapterError, match=r"at most 128 channels, so at most 10% .*'K\+V'"):
        world.apply(world.model, world.adapter, world.prompt, embeds_scaling=scaling)


def test_every_weight_type_runs(pack, world):
    counts = {}
    for weight_type in pack.core.WEIGHT_TYPES:
        patched = world.apply(world.model, world.adapter, world.prompt, weight=0.8, weight_type=weight_type)
        counts[weight_type] = len(patches(patched))
        assert torch.isfinite(world.sample(patched, steps=1)).all()
    assert counts["linear"] == 16
    assert counts["style transfer"] == 11
    assert counts["composition"] == 2


def test_adapter_of_half_precision(pack, world):
    """An fp16 file on an fp32 model: keys and values are computed in fp32."""
    adapter = world.new_adapter(world.model)
    adapter.adapter.half()
    patched = world.apply(world.model, adapter, world.new_prompt(adapter))
    torch.testing.assert_close(
        world.sample(patched), world.sample(world.apply(world.model, world.adapter, world.prompt)), atol=0.02, rtol=0.02
    )
    assert {part.dtype for part in held(patched)} == {torch.float32}


def test_bytes_held_are_the_keys_and_values_only(world):
    patched = world.apply(world.model, world.adapter, world.prompt)
    widths = world.adapter.spec.layer_dims
    assert sum(part.nbytes for part in held(patched)) == 2 * 2 * 4 * 4 * sum(
        widths
    )  # K and V, both branches, 4 tokens, 4 bytes


def test_patches_of_other_packs_are_still_looked_after(pack, world):
    """ComfyUI moves, loads and cleans up patches; ours passes that on to the one it stands on."""

    class Foreign:
        device, cleaned = "cpu", 0

        def __call__(self, query, key, value, options):
            return query

        def to(self, device):
            moved = Foreign()
            moved.device = str(device)
            return moved

        def models(self):
            return ["patcher"]

        def cleanup(self):
            self.cleaned += 1

    model = world.model.clone()
    foreign = Foreign()
    model.set_model_attn2_replace(foreign, "middle", 0, 0)
    patch = patches(world.apply(model, world.adapter, world.prompt))["middle", 0, 0]
    foreign = patch.previous  # a copy of it where clones copy patches
    assert isinstance(foreign, Foreign)
    assert patch.to(torch.device("meta")).previous.device == "meta"
    assert foreign.device == "cpu"
    assert patch.models() == ["patcher"]
    patch.cleanup()
    assert foreign.cleaned == 1
    with pytest.raises(pack.core.AdapterError, match="before Apply IP Adapter"):
        patch.add(foreign)


def test_a_grid_that_no_level_has(world):
    """Nodes that shrink the activations for a while: the mask is resized for them."""

    def shrink(h, options):
        return torch.nn.functional.interpolate(h, scale_factor=0.6) if options["block"] == ("input", 3) else h

    model = world.model.clone()
    model.set_model_input_block_patch(shrink)
    model.set_model_output_block_patch(
        lambda h, skip, options: (torch.nn.functional.interpolate(h, skip.shape[-2:]), skip)
    )
    ones = world.apply(model, world.adapter, world.prompt, attn_mask=torch.ones(1, 8, 8))
    plain = world.apply(model, world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(ones), world.sample(plain), atol=1e-3, rtol=1e-3)


def test_a_window_of_frames_takes_its_own_masks(world):
    """AnimateDiff samples some frames at a time and says which in `ad_params`."""
    left = torch.zeros(16, 16)
    left[:, :8] = 1.0
    masks = torch.stack([left, torch.ones(16, 16)])
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    options = patched.model_options["transformer_options"]
    options["ad_params"] = {"sub_idxs": [1]}
    unmasked = world.sample(world.apply(world.model, world.adapter, world.prompt))
    torch.testing.assert_close(world.sample(patched), unmasked, atol=1e-3, rtol=1e-4)
    options["ad_params"] = {"sub_idxs": None}
    half = world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=left))
    assert torch.equal(world.sample(patched), half) and not torch.allclose(half, unmasked, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_has_keys_of_its_dtype(world, monkeypatch, dtype):
    import comfy.supported_models

    original = comfy.supported_models.SD15.set_inference_dtype
    monkeypatch.setattr(
        comfy.supported_models.SD15, "set_inference_dtype", lambda self, *_: original(self, dtype, None)
    )
    model = world.new_model()
    patched = world.apply(model, world.adapter, world.prompt)
    assert {part.dtype for part in held(patched)} == {dtype}
    sampled = world.sample(patched, steps=1)
    assert torch.isfinite(sampled).all()
    assert not torch.equal(sampled, world.sample(model, steps=1))


def test_attention_has_the_precision_and_the_options_of_the_model(pack, world, monkeypatch):
    """As SD2 asks for fp32, and as overrides of attention need them."""
    import comfy.ldm.modules.attention as attention

    model = world.new_model()
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "attn_precision"):
            module.attn_precision = torch.float32
    patched = world.apply(model, world.adapter, world.prompt)
    text, image = [], []
    optimized, in_fp32 = attention.optimized_attention, pack.patch._attend_in_fp32

    def text_attention(query, key, value, *args, **kwargs):
        if key.shape[1] == 7:
            text.append(kwargs)
        return optimized(query, key, value, *args, **kwargs)

    def image_attention(*args):
        image.append(args)
        return in_fp32(*args)

    monkeypatch.setattr(attention, "optimized_attention", text_attention)
    monkeypatch.setattr(pack.patch, "_attend_in_fp32", image_attention)
    world.sample(patched, steps=1)
    assert len(text) == len(image) > 0 and len(text) % 16 == 0
    for options in text:
        assert options["attn_precision"] is torch.float32
        assert "block" in options["transformer_options"] and "sigmas" in options["transformer_options"]
