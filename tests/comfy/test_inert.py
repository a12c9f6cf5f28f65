"""Inputs that would do nothing are named before sampling: an error where nobody can want it, else a line in the log."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

ONES, ZEROS = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)
DOT = torch.zeros(1, 512, 512)
DOT[:, 3, 3] = 1.0


@pytest.fixture
def refuse(pack):
    def check(call, *words):
        with pytest.raises(pack.core.AdapterError) as error:
            call()
        for word in words:
            assert word in str(error.value), str(error.value)

    return check


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 64, 64), ["attn_mask is 0 everywhere", "Load Image gives such a mask", "disconnect it"]),
        (torch.zeros(3, 64, 64), ["All 3 masks of attn_mask are 0 everywhere", "Load Image (as Mask)"]),
        (torch.full((2, 8, 8), torch.nan), ["attn_mask 1 of 2 holds NaN"]),
        (torch.stack([ONES[0], 255 * ONES[0]]), ["attn_mask 2 of 2 has values from 255 to 255", "from 0 to 1"]),
    ],
)
def test_masks(world, refuse, mask, words):
    refuse(lambda: world.apply(world.model, world.adapter, world.prompt, attn_mask=mask), *words)


def test_load_image_without_transparency(world, pack, refuse, comfyui):
    """ComfyUI's own node, on its own example image."""
    import folder_paths

    import nodes

    folder_paths.set_input_directory(str(comfyui / "input"))
    image, mask = nodes.LoadImage().load_image("example.png")
    assert image.shape[-1] == 3 and mask.shape == (1, 64, 64) and not mask.any()
    refuse(
        lambda: world.apply(world.model, world.adapter, world.prompt, attn_mask=mask), "Load Image gives such a mask"
    )


def test_frames_may_be_empty(world):
    masks = torch.cat([ZEROS, ONES, ZEROS])
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    sampled, base = world.sample(patched, batch=3, steps=1), world.sample(world.model, batch=3, steps=1)
    assert [torch.equal(*pair) for pair in zip(sampled, base, strict=True)] == [True, False, True]


def test_masks_beyond_the_images_are_logged(world, caplog):
    masks = torch.cat([ONES, ONES, ZEROS])
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    for batch, words in (
        (1, "attn_mask has 3 masks, one for each latent, and 1 is sampled: masks 2 to 3 are not used. Sample 3"),
        (2, "attn_mask has 3 masks, one for each latent, and 2 are sampled: mask 3 is not used. Sample 3 latents"),
    ):
        caplog.clear()
        world.sample(patched, batch=batch, steps=1)
        assert words in caplog.text
    caplog.clear()
    for batch in (3, 4):
        world.sample(patched, batch=batch, steps=1)
    assert not caplog.text


def test_overshoot_of_resampling_is_cut_off(world):
    mask = torch.cat([1.2 * ONES[..., :8], -0.2 * ONES[..., :8]], dim=-1)
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=mask)
    want = world.apply(world.model, world.adapter, world.prompt, attn_mask=mask.clamp(0, 1))
    assert torch.equal(world.sample(patched, steps=1), world.sample(want, steps=1))


def test_a_mask_that_the_latent_is_too_coarse_for(world, refuse):
    """Known only when the sampler runs, before its first step."""
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=DOT)
    refuse(lambda: world.sample(patched), "attn_mask is 0 at every place of the 16 x 16 latent", "Grow the mask")


def test_masks_of_the_images_that_are_sampled(world, refuse):
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=torch.cat([ZEROS, ZEROS, ONES]))
    refuse(lambda: world.sample(patched, batch=2), "attn_mask has 3 masks, and the first 2", "order of the images")
    assert torch.isfinite(world.sample(patched, batch=3, steps=1)).all()


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.4), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_windows(world, refuse, start, end):
    refuse(
        lambda: world.apply(world.model, world.adapter, world.prompt, start_at=start, end_at=end),
        f"start_at {start:g} is not below end_at {end:g}",
        "set weight to 0",
    )


def test_a_window_that_is_no_number(world, refuse):
    refuse(
        lambda: world.apply(world.model, world.adapter, world.prompt, start_at=float("nan")),
        "start_at is nan. Choose a number from 0 to 1.",
    )


def test_a_window_between_two_steps_is_logged(world, caplog):
    """A second pass, or the first of two samplers, may leave out a window on purpose."""
    patched = world.apply(world.model, world.adapter, world.prompt, start_at=0.2, end_at=0.3)
    assert torch.equal(world.sample(patched, steps=2), world.base)
    assert "acts in none of these 2 steps: none lies between start_at 0.2 and end_at 0.3" in caplog.text
    caplog.clear()
    world.sample(patched, steps=10)
    assert not caplog.text


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(world, refuse, weight):
    refuse(lambda: world.apply(world.model, world.adapter, world.prompt, weight=weight), f"weight is {weight}")


def test_numbers_of_numpy(world):
    """Other packs put them on a wire."""
    half = world.sample(world.apply(world.model, world.adapter, world.prompt, weight=0.5))
    for number in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(world.sample(world.apply(world.model, world.adapter, world.prompt, weight=number)), half)


def test_weights_beyond_the_precision_of_the_model(pack, world, refuse):
    model = world.new_model(dtype=torch.float16)
    prompt = world.new_prompt(world.adapter, weight=1e6)
    refuse(lambda: world.apply(model, world.adapter, prompt), "are too large for the model's float16. Lower them")


def test_weight_zero_switches_off_whatever_else_is_connected(world):
    options = {"attn_mask": ZEROS, "start_at": 0.6, "end_at": 0.4, "embeds_scaling": "K+V w/ C penalty"}
    patched = world.apply(world.model, world.adapter, world.prompt, weight=0.0, **options)
    assert torch.equal(world.sample(patched), world.base)


def test_what_needs_a_negative_branch(pack, world, caplog):
    features = torch.randn(2, 48, generator=torch.Generator().manual_seed(91))
    prompt = pack.types.ImagePrompt(*map(pack.types.EncodedImages, features[:, None]), world.adapter.name)
    with_negative = dataclasses.replace(prompt, has_negative=True)
    for patched, name in (
        (world.apply(world.model, world.adapter, with_negative), "image_negative"),
        (
            world.apply(world.model, world.adapter, prompt, weight_type="style transfer precise"),
            "weight_type 'style transfer precise'",
        ),
    ):
        caplog.clear()
        world.sample(patched, cfg=1.0, steps=1)
        assert f"{name} acts in the negative branch, which cfg 1 leaves out" in caplog.text
        caplog.clear()
        world.sample(patched, cfg=1.5, steps=1)
        assert not caplog.text
    world.sample(world.apply(world.model, world.adapter, prompt), cfg=1.0, steps=1)
    assert not caplog.text


def test_former_names_of_weight_types(pack, world):
    for name, now in pack.core.weight_types.WEIGHT_TYPE_ALIASES.items():
        assert pack.ApplyIPAdapter.validate_inputs(name) is True
        patched = world.apply(world.model, world.adapter, world.prompt, weight_type=name)
        want = world.apply(world.model, world.adapter, world.prompt, weight_type=now)
        assert torch.equal(world.sample(patched, steps=1), world.sample(want, steps=1))
    assert pack.ApplyIPAdapter.validate_inputs() is True  # over a wire, or left out
    assert "'channel penalty' is now 'linear'" in pack.ApplyIPAdapter.validate_inputs("channel penalty")
    assert "Unknown weight type 5" in pack.ApplyIPAdapter.validate_inputs(5)
