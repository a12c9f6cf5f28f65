"""Encode Image Prompt with a tiny CLIP vision model of ComfyUI's own class."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def images():
    return torch.rand(3, 40, 64, 3, generator=torch.Generator().manual_seed(32))


@pytest.fixture(scope="module")
def plus(world):
    with torch.inference_mode():
        return world.new_adapter(world.model, kind="plus", name="plus")


@pytest.fixture
def encode(pack, world):
    """The image prompt of the node, and its tokens."""

    def run(adapter, *args, **options):
        prompt = pack.EncodeImagePrompt.execute(adapter, *args, **options).args[0]
        return prompt, world.tokens(adapter, prompt)

    return run


def test_base_and_plus(encode, world, encoder, plus, images):
    for adapter in (world.adapter, plus):
        prompt, tokens = encode(adapter, encoder, images[:1])
        assert tokens.positive.shape == tokens.negative.shape == (1, 4, 64)
        assert not torch.allclose(tokens.positive, tokens.negative)
        patched = world.apply(world.model, adapter, prompt)
        assert not torch.equal(world.sample(patched), world.base)


def test_center_is_comfyuis_own_preprocessing(encode, world, encoder, images):
    _, prompt = encode(world.adapter, encoder, images[:1])
    own = world.adapter.adapter.encode(encoder.encode_image(images[:1])["image_embeds"])
    torch.testing.assert_close(prompt.positive, own, atol=1e-4, rtol=1e-4)


def test_the_negative_of_training(encode, world, encoder, plus, images):
    """base: the projection of zeros. plus: the encoding of a grey image, which a black image is not."""
    _, base = encode(world.adapter, encoder, images[:1])
    torch.testing.assert_close(base.negative, world.adapter.adapter.encode(torch.zeros(1, 48)))
    states = encoder.model(pixel_values=torch.zeros(1, 3, 32, 32), intermediate_output=-2)[1]
    _, trained = encode(plus, encoder, images[:1])
    torch.testing.assert_close(trained.negative, plus.adapter.encode(states))
    _, black = encode(plus, encoder, images[:1], negative="black image")
    _, given = encode(plus, encoder, images[:1], image_negative=torch.zeros(1, 9, 9, 3))
    assert not torch.allclose(black.negative, trained.negative)
    torch.testing.assert_close(black.negative, given.negative)


def test_combine(encode, world, encoder, images):
    prompt, joined = encode(world.adapter, encoder, images)
    assert joined.positive.shape == joined.negative.shape == (1, 12, 64) and len(prompt.positive) == 3
    seen = {"concat": joined.positive[:, :4]}
    for combine in ("add", "subtract", "average", "norm average", "max", "min"):
        prompt, tokens = encode(world.adapter, encoder, images, combine=combine)
        assert tokens.positive.shape == (1, 4, 64) and len(prompt.positive) == 1
        assert not any(torch.allclose(tokens.positive, other) for other in seen.values())
        seen[combine] = tokens.positive
    _, one = encode(world.adapter, encoder, images[:1])
    torch.testing.assert_close(joined.positive[:, :4], one.positive, atol=1e-4, rtol=1e-4)


def test_several_negative_images(encode, world, encoder, images):
    prompt, tokens = encode(world.adapter, encoder, images, image_negative=images[:2])
    assert tokens.positive.shape == tokens.negative.shape == (1, 24, 64)
    assert (len(prompt.positive), len(prompt.negative)) == (3, 2)


def test_mask_and_weight(encode, world, encoder, images):
    prompt, whole = encode(world.adapter, encoder, images[:1])
    weak, seen = encode(world.adapter, encoder, images[:1], mask=torch.ones(1, 7, 9), weight=0.5)
    torch.testing.assert_close(seen.positive, whole.positive, atol=1e-3, rtol=1e-3)
    corner = torch.zeros(1, 7, 9)
    corner[:, 3, 4] = 1.0
    _, hidden = encode(world.adapter, encoder, images[:1], mask=corner)
    assert not torch.allclose(hidden.positive, whole.positive)
    half = world.apply(world.model, world.adapter, prompt, weight=0.5)
    torch.testing.assert_close(
        world.sample(world.apply(world.model, world.adapter, weak)), world.sample(half), atol=5e-2, rtol=1e-2
    )


@pytest.mark.parametrize("crop", ["center", "top", "bottom", "left", "right", "pad", "stretch"])
def test_the_preview_shows_the_crop(pack, world, encoder, images, crop):
    import folder_paths
    from PIL import Image

    output = pack.EncodeImagePrompt.execute(world.adapter, encoder, images[:1], crop=crop)
    shown = output.ui.as_dict()["images"][0]
    with Image.open(f"{folder_paths.get_temp_directory()}/{shown['filename']}") as image:
        assert image.size == (32, 32)
