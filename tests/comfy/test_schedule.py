"""Weight Schedule: over the steps of a run, over the frames of a batch and of its windows."""

from __future__ import annotations

import inspect

import pytest
import torch


@pytest.fixture
def scheduled(pack, world):
    def scheduled(over, weights, *, timing="custom", start=0, end=9999, model=None, **options):
        made = pack.WeightSchedule.execute(over, weights, timing, start, end).args[0]
        return world.apply(model or world.model, world.adapter, world.prompt, weight_schedule=made, **options)

    return scheduled


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def in_steps(model, start, end, steps):
    """A window that holds the steps from `start` up to, not including, `end`."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:-1]
    percents = [number / 1000 for number in range(1001)]
    inside = [float(sampling.percent_to_sigma(percent)) for percent in percents]
    first = max(p for p, sigma in zip(percents, inside, strict=True) if sigma >= sigmas[start])
    last = min(p for p, sigma in zip(percents, inside, strict=True) if sigma <= sigmas[end - 1])
    return {"start_at": first, "end_at": last}


def test_over_steps(world, scheduled):
    """Equal to one Apply IP Adapter for each weight, each with its own window."""
    got = world.sample(scheduled("steps", "0.9, 0.9, 0, 0.3"), steps=4)
    early = world.apply(world.model, world.adapter, world.prompt, weight=0.9, **in_steps(world.model, 0, 2, 4))
    want = world.apply(early, world.adapter, world.prompt, weight=0.3, **in_steps(world.model, 3, 4, 4))
    close(got, world.sample(want, steps=4))
    assert not torch.allclose(got, world.sample(early, steps=4), atol=1e-2)


def test_a_timing_over_steps(world, scheduled):
    got = world.sample(scheduled("steps", "1, 0", timing="linear"), steps=5)
    close(got, world.sample(scheduled("steps", "1, 0.75, 0.5, 0.25, 0"), steps=5))
    late = scheduled("steps", "1, 0", timing="linear", start=2, end=5)
    close(world.sample(late, steps=5), world.sample(scheduled("steps", "1, 1, 1, 0.5, 0"), steps=5))


def test_samplers_that_call_in_between(world, scheduled):
    import comfy.sample

    def heun(model):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
        positive, negative = world.conds()
        options = ("heun", "normal", positive, negative, torch.zeros_like(noise))
        return comfy.sample.sample(model, noise, 3, 4.0, *options, seed=5)

    half = world.apply(world.model, world.adapter, world.prompt, weight=0.5)
    close(heun(scheduled("steps", "0.5, 0.5, 0.5")), heun(half))
    assert torch.isfinite(heun(scheduled("steps", "1, 0", timing="ease in-out"))).all()


@pytest.mark.parametrize("masked", [False, True])
def test_over_frames(world, scheduled, masked):
    options = {"attn_mask": torch.ones(1, 16, 16).tril()} if masked else {}
    got = world.sample(scheduled("frames", "0, 0.5, 1.2", **options), batch=3)
    assert torch.equal(got[0], world.sample(world.model, batch=3)[0])
    for frame, weight in ((1, 0.5), (2, 1.2)):
        want = world.apply(world.model, world.adapter, world.prompt, weight=weight, **options)
        close(got[frame], world.sample(want, batch=3)[frame])


def test_over_frames_with_an_image_each(pack, world, scheduled):
    import dataclasses

    made = pack.WeightSchedule.execute("frames", "1, 0, 0.5", "custom").args[0]
    prompt = dataclasses.replace(world.new_prompt(world.adapter, images=3), one_each=True)
    got = world.sample(world.apply(world.model, world.adapter, prompt, weight_schedule=made), batch=3)
    weighted = dataclasses.replace(prompt, positive=dataclasses.replace(prompt.positive, weights=(1.0, 0.0, 0.5)))
    negatives = torch.zeros(3, 48)  # as the adapter's own zeros, with a weight each
    against = pack.types.EncodedImages(negatives, weights=(1.0, 0.0, 0.5))
    weighted = dataclasses.replace(weighted, negative=against)
    close(got, world.sample(world.apply(world.model, world.adapter, weighted), batch=3))


def test_a_window_of_the_noise_schedule_still_counts(world, scheduled):
    patched = scheduled("frames", "1, 0.5", end_at=0.5)
    got = world.sample(patched, batch=2, steps=4)
    want = world.apply(world.model, world.adapter, world.prompt, weight=0.5, end_at=0.5)
    close(got[1], world.sample(want, batch=2, steps=4)[1])


def test_context_windows_keep_the_weight_of_each_frame(world, scheduled):
    import comfy.context_windows
    import comfy_extras.nodes_context_windows as extras

    node = extras.ContextWindowsManualNode
    if "freenoise" not in inspect.signature(node.execute).parameters:
        pytest.skip("the windows of this ComfyUI do not run over a batch of images")
    arguments = {
        "context_length": 2,
        "context_overlap": 0,
        "context_schedule": comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "flat",
        "dim": 0,
        "freenoise": False,
    }

    def windowed(model):
        return world.sample(node.execute(model, **arguments).args[0], batch=4)

    got = windowed(scheduled("frames", "0, 0, 0.5, 1"))
    close(got[:2], windowed(world.model)[:2])
    for frame, weight in ((2, 0.5), (3, 1.0)):
        want = world.apply(world.model, world.adapter, world.prompt, weight=weight)
        close(got[frame], windowed(want)[frame])


def animatediff(model, windows):
    """As AnimateDiff-Evolved does: window by window, which frames it has in the options."""

    def sample(apply, args):
        x, t, given = args["input"], args["timestep"], args["c"]
        chunks = len(args["cond_or_uncond"])
        out = torch.empty_like(x)
        for window in windows:
            rows = [chunk * (len(x) // chunks) + frame for chunk in range(chunks) for frame in window]
            parts = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in given.items()}
            parts["transformer_options"] = {**given["transformer_options"], "ad_params": {"sub_idxs": window}}
            out[rows] = apply(x[rows], t[rows], **parts)
        return out

    clone = model.clone()
    clone.set_model_unet_function_wrapper(sample)
    return clone


def test_animatediff_windows(world, scheduled):
    patched = animatediff(scheduled("frames", "0, 1, 0.5, 0.2"), [[0, 2], [1, 3]])
    close(world.sample(patched, batch=4), world.sample(scheduled("frames", "0, 1, 0.5, 0.2"), batch=4))


@pytest.mark.parametrize(
    ("over", "weights", "note"),
    [
        ("frames", "1, 1, 0.5", "Weight Schedule has 3 weights for 2 frames: the first 2 act"),
        ("steps", "1, 1, 1, 0.5", "Weight Schedule has 4 weights for 3 steps: the first 3 act"),
        ("frames", "0, 0, 1", "Weight Schedule is 0 in all 2 frames, so the image prompt does not act"),
    ],
)
def test_what_has_no_effect_is_logged(world, scheduled, caplog, over, weights, note):
    world.sample(scheduled(over, weights), batch=2, steps=3)
    assert f"Apply IP Adapter: {note}" in caplog.text
    caplog.clear()
    world.sample(scheduled(over, "1, 0", timing="linear"), batch=2, steps=3)
    assert not caplog.text


def test_refusals(pack, world, scheduled):
    for over, weights, timing, words in (
        ("steps", "1, half", "linear", "weights: entry 2, 'half', is not a number"),
        ("steps", "1", "linear", "1 weight for timing 'linear'"),
        ("frames", "0, 0", "custom", "All weights of the schedule are 0"),
    ):
        with pytest.raises(pack.core.AdapterError, match=words):
            scheduled(over, weights, timing=timing)
    with pytest.raises(pack.core.AdapterError, match="Use 'V only' with a schedule"):
        scheduled("steps", "1, 0", embeds_scaling="K+V")


@pytest.mark.parametrize(("over", "weights"), [("steps", "0, 0.5, 1"), ("frames", "1, 0.3")])
def test_a_compiled_model(world, scheduled, over, weights):
    import comfy_extras.nodes_torch_compile as extras
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    keep = getattr(extras, "skip_torch_compile_dict", None)  # the node's own filter of guards
    want = world.sample(scheduled(over, weights), batch=2, steps=3)
    torch._dynamo.reset()
    model = scheduled(over, weights)
    set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": keep} if keep else None)
    close(world.sample(model, batch=2, steps=3), want)
    torch._dynamo.reset()
