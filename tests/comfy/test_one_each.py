"""One image for each latent: image i guides latent i, or frame i of a video, in windows of frames too."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import pytest
import torch

FRAMES = 4


@pytest.fixture
def encode(pack, world, encoder):
    def run(image, adapter=world.adapter, **options):
        return pack.EncodeImagePrompt.execute(adapter, encoder, image, **options).args[0]

    return run


@pytest.fixture(scope="module")
def images():
    """Very different ones."""
    generator = torch.Generator().manual_seed(95)
    return torch.rand(FRAMES, 1, 1, 3, generator=generator) * torch.rand(FRAMES, 40, 40, 3, generator=generator)


@pytest.fixture(params=["base", "plus"])
def adapter(request, world):
    return world.new_adapter(world.model, kind=request.param, seed=21, name=request.param)


@pytest.fixture
def frames_alone(world, encode, images, adapter):
    """What each frame is when its image guides all frames."""

    def run(sample=world.sample, **options):
        models = [world.apply(world.model, adapter, encode(image[None], adapter)) for image in images]
        return torch.cat([sample(model, batch=FRAMES, **options)[i : i + 1] for i, model in enumerate(models)])

    return run


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_image_i_guides_latent_i(world, encode, images, adapter, frames_alone):
    prompt = encode(images, adapter, one_each=True)
    patched = world.apply(world.model, adapter, prompt)
    got, want = world.sample(patched, batch=FRAMES), frames_alone()
    close(got, want)
    assert (want[0] - want[1]).abs().max() > 0.1 and not torch.allclose(got, got.flip(0), atol=0.1)
    joined = world.apply(world.model, adapter, encode(images, adapter))
    assert not torch.allclose(world.sample(joined, batch=FRAMES), got, atol=0.05)


def test_a_negative_image_for_each(world, encode, images, adapter):
    negative = images.flip(0)
    each = world.apply(world.model, adapter, encode(images, adapter, image_negative=negative, one_each=True))
    got = world.sample(each, batch=FRAMES)
    for i in (0, 3):
        one = encode(images[i : i + 1], adapter, image_negative=negative[i : i + 1].clone())
        close(got[i], world.sample(world.apply(world.model, adapter, one), batch=FRAMES)[i])


def test_one_negative_image_for_all_keeps_its_weight(world, encode, images, adapter):
    """With one weight for all images, and with one for each, whose signs may differ; 0 switches a frame off."""
    prompt = encode(images[:2], adapter, image_negative=images[2:3], one_each=True)

    def sample(own, negative):
        weighted = dataclasses.replace(
            prompt,
            positive=dataclasses.replace(prompt.positive, weights=own),
            negative=dataclasses.replace(prompt.negative, weights=(negative,)),
        )
        return world.sample(world.apply(world.model, adapter, weighted), batch=2)

    for negative in (0.2, 1.0):
        mixed = sample((1.0, -0.9), negative)
        close(mixed[0], sample((1.0, 1.0), negative)[0])
        close(mixed[1], sample((-0.9, -0.9), negative)[1])
    close(sample((1.0, 0.0), 1.0)[1], world.sample(world.model, batch=2)[1])


def test_combined_images_keep_their_weights_beside_one_negative_image(pack, world, encode, images, adapter):
    first, second = (encode(images[i : i + 1], adapter, image_negative=images[2:3], one_each=True) for i in (0, 1))
    both = pack.CombineImagePrompts.execute(first, second, "concat", weight_1=1.0, weight_2=-0.5).args[0]
    got = world.sample(world.apply(world.model, adapter, both), batch=2)
    for i, (prompt, weight) in enumerate(((first, 1.0), (second, -0.5))):
        alone = world.sample(world.apply(world.model, adapter, prompt.weighted(weight)), batch=2)
        close(got[i], alone[i])


@pytest.fixture
def log(caplog):
    def lines(model, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="ip_adapter_kit"):
            options["sample"](model, batch=options["batch"])
        return [record.getMessage() for record in caplog.records if record.name == "ip_adapter_kit"]

    return lines


def test_more_latents_than_images(world, encode, images, adapter, log):
    two = world.apply(world.model, adapter, encode(images[:2], adapter, one_each=True))
    last = torch.cat([images[:2], images[1:2], images[1:2]])
    all_four = world.apply(world.model, adapter, encode(last, adapter, one_each=True))
    close(world.sample(two, batch=FRAMES), world.sample(all_four, batch=FRAMES))
    assert not log(two, sample=world.sample, batch=FRAMES)


def test_images_that_are_never_used_are_logged(world, encode, images, adapter, log):
    patched = world.apply(world.model, adapter, encode(images, adapter, one_each=True))
    assert not log(patched, sample=world.sample, batch=4)
    (line,) = log(patched, sample=world.sample, batch=2)
    assert "has 4 images, one for each latent, and 2 are sampled: images 3 to 4 act in none" in line
    (line,) = log(patched, sample=world.sample, batch=3)
    assert "3 are sampled: image 4 acts in none" in line
    assert not log(world.apply(world.model, adapter, encode(images, adapter)), sample=world.sample, batch=1)


def test_refusals(pack, encode, images):
    for words, options in (
        (("one_each keeps the images apart, combine 'average'", "'concat'"), {"combine": "average"}),
        (("one_each takes one image for each latent, tiles 2",), {"tiles": 2}),
        (("There are 4 images, one for each latent, and 2 negative",), {"image_negative": images[:2]}),
    ):
        with pytest.raises(pack.core.AdapterError) as error:
            encode(images, one_each=True, **options)
        assert all(word in str(error.value) for word in words), str(error.value)


def windows(length=2, **options):
    """A function that lets ComfyUI's Context Windows sample a model, `length` frames at a time."""
    import comfy.context_windows
    import comfy_extras.nodes_context_windows as extras

    node = extras.ContextWindowsManualNode
    arguments = {
        "context_length": length,
        "context_overlap": 0,
        "context_schedule": comfy.context_windows.ContextSchedules.STATIC_STANDARD,
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "flat",
        "dim": 0,
        **options,
    }
    if "freenoise" not in inspect.signature(node.execute).parameters:
        pytest.skip("the windows of this ComfyUI do not run over a batch of images")
    arguments["freenoise"] = False
    return lambda model: node.execute(model, **arguments).args[0]


@pytest.mark.parametrize("options", [{}, {"context_overlap": 1}, {"length": 3}])
def test_context_windows(world, encode, images, adapter, frames_alone, options):
    window = windows(**options)
    patched = world.apply(world.model, adapter, encode(images, adapter, one_each=True))
    got = world.sample(window(patched), batch=FRAMES)
    close(got, frames_alone(lambda model, **more: world.sample(window(model), **more)))
    assert not torch.allclose(got[0], got[3], atol=0.1)


@pytest.fixture
def animate_diff(world):
    """The way AnimateDiff-Evolved samples a window of frames: `ad_params` in the options of each call."""

    def install(model, order):
        patched = model.clone()

        def window(forward, call):
            x, t, c = call["input"], call["timestep"], call["c"]
            chunks = len(c["transformer_options"]["cond_or_uncond"])
            frames = len(x) // chunks
            out = torch.zeros_like(x)
            for part in order:
                rows = [chunk * frames + frame for chunk in range(chunks) for frame in part]
                options = {**c["transformer_options"], "ad_params": {"sub_idxs": part, "full_length": frames}}
                inputs = {k: v[rows] if torch.is_tensor(v) and len(v) == len(x) else v for k, v in c.items()}
                out[rows] = forward(x[rows], t[rows], **{**inputs, "transformer_options": options})
            return out

        patched.set_model_unet_function_wrapper(window)
        return patched

    return install


@pytest.mark.parametrize("order", [[[0, 1], [2, 3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]])
def test_animate_diff(world, encode, images, adapter, frames_alone, animate_diff, order):
    patched = world.apply(world.model, adapter, encode(images, adapter, one_each=True))
    close(world.sample(animate_diff(patched, order), batch=FRAMES), frames_alone())


def test_only_the_keys_of_a_window_are_on_the_device(pack, world, encode, adapter, animate_diff):
    """Of 64 frames in windows of 16: K/V of 16 and their negative at a time, and nothing else of the adapter."""
    frames, length = 64, 16
    images = torch.rand(frames, 32, 32, 3, generator=torch.Generator().manual_seed(96))
    patched = world.apply(world.model, adapter, encode(images, adapter, one_each=True))
    application = next(iter(patched.wrappers["apply_model"].values()))[0]
    assert isinstance(application, pack.application.Application) and application.rows == (frames, 1)

    def size(pairs):
        return sum(part.nbytes for pair in pairs.values() for part in pair)

    a_row = sum(4 * 2 * site.dim * 4 for site in pack.core.cross_attention_sites(world.model.model.diffusion_model))
    assert size(application.pairs) == (frames + 1) * a_row  # 4 tokens, K and V, fp32
    seen = []
    model = animate_diff(patched, [list(range(i, i + length)) for i in range(0, frames, length)])
    original = pack.application.Application._select

    def select(self, rows, device):
        made = original(self, rows, device)
        seen.append((len(set(rows)), len(rows), size(made)))
        return made

    pack.application.Application._select = select
    try:
        world.sample(model, batch=frames, steps=1, size=(8, 8))
    finally:
        pack.application.Application._select = original
    assert seen and all(found == (length + 1, 2 * length, 2 * length * a_row) for found in seen)
