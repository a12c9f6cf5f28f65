"""Encode Image Prompt on images, masks and encoders that are not what they should be; with two images too."""

from __future__ import annotations

import copy

import pytest
import torch


@pytest.fixture
def encode(pack, world, encoder):
    def run(image, encoder=encoder, adapter=world.adapter, **options):
        return pack.EncodeImagePrompt.execute(adapter, encoder, image, **options)

    return run


@pytest.fixture
def refuse(pack, encode):
    def check(image, *words, **options):
        with pytest.raises(pack.core.AdapterError) as error:
            encode(image, **options)
        for word in words:
            assert word in str(error.value), str(error.value)

    return check


def images(count=1, height=40, width=64, channels=3):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(81))


def with_values(image, value, index=0):
    changed = image.clone()
    changed[index, 1, 1, 0] = value
    return changed


@pytest.mark.parametrize("name", ["image", "image_negative"])
def test_images(refuse, name):
    def check(image, *words):
        given = {"image": image} if name == "image" else {"image": images(), "image_negative": image}
        refuse(given.pop("image"), *words, **given)

    check(with_values(images(), torch.nan), f"{name} holds NaN or infinity")
    check(with_values(images(2), torch.inf, 1), f"{name} 2 of 2 holds NaN or infinity")
    check(images() * 255, f"{name} has values from ", "an image goes from 0 to 1")
    check(images(2) * 2 - 1, f"{name} 1 of 2 has values from -0.9")
    check((images() * 255).byte(), f"{name} has values from 0 to 25")
    for shape in ((0, 8, 8, 3), (1, 0, 8, 3), (2, 8, 0, 3), (1, 8, 8, 2), (1, 8, 8, 5), (8, 8, 3)):
        check(torch.zeros(shape), f"{name} has the shape {shape}", "3 channels")


def test_grey_and_alpha(encode):
    grey = images(channels=1)
    want = encode(grey.expand(-1, -1, -1, 3)).args[0]
    assert torch.equal(encode(grey).args[0].positive.image, want.positive.image)
    alpha = torch.cat([images(), torch.zeros(1, 40, 64, 1)], dim=-1)
    assert torch.equal(encode(alpha).args[0].positive.image, encode(images()).args[0].positive.image)


def test_masks(refuse):
    zeros, ones = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)
    refuse(images(), "mask is 0 everywhere", "hides all of image from", "Load Image gives such a mask", mask=zeros)
    refuse(images(2), "mask is 0 everywhere", "all of every image", mask=zeros)
    refuse(images(2), "mask 2 of 2 is 0", "all of image 2 of 2", mask=torch.cat([ones, zeros]))
    refuse(images(), "There are 2 masks for 1 image.", mask=torch.cat([ones, ones]))
    refuse(images(), "mask holds NaN", mask=ones * torch.nan)
    refuse(images(), "mask has values from 255 to 255", mask=ones * 255)
    refuse(images(), "mask has the shape (1, 16, 16, 3)", mask=torch.ones(1, 16, 16, 3))
    left = zeros.clone()
    left[..., :4] = 1.0
    refuse(images(), "mask hides all that crop 'center' keeps of image", "'pad'", mask=left)
    refuse(images(2), "mask 2 of 2 hides all that crop 'right' keeps", mask=torch.cat([ones, left]), crop="right")


@pytest.mark.parametrize("crop", ["left", "pad", "stretch"])
def test_a_mask_at_the_side_is_seen_by_other_crops(encode, crop):
    left = torch.zeros(1, 64, 64)
    left[..., :4] = 1.0
    seen, whole = (encode(images(), crop=crop, **mask).args[0].positive.image for mask in ({"mask": left}, {}))
    assert torch.isfinite(seen).all() and not torch.allclose(seen, whole)


def test_subtracting_an_image_from_itself(refuse, encode):
    refuse(images().repeat(2, 1, 1, 1), "combine 'subtract' leaves nothing", combine="subtract")
    refuse(images().repeat(3, 1, 1, 1), "combine 'subtract' leaves nothing", combine="subtract")
    assert torch.isfinite(encode(images(2), combine="subtract").args[0].positive.image).all()


@pytest.mark.parametrize(("value", "words"), [(0.0, "are zero. The download broke off"), (torch.nan, "holds NaN")])
@pytest.mark.parametrize("layer", ["encoder.layers.1.mlp.fc1.weight", "embeddings.patch_embedding.weight"])
def test_a_damaged_encoder(refuse, encoder, layer, value, words):
    """From any loader: the check is where it is used."""
    damaged = copy.deepcopy(encoder)
    damaged.model.get_parameter(f"vision_model.{layer}").fill_(value)
    refuse(images(), "The connected image encoder: ", f"vision_model.{layer}", words, encoder=damaged)
    refuse(images(2), words, encoder=damaged)


@pytest.mark.parametrize(("value", "words"), [(0.0, "nothing but 0"), (torch.nan, "NaN or infinity")])
def test_a_damaged_projection(refuse, encoder, value, words):
    damaged = copy.deepcopy(encoder)
    damaged.model.visual_projection.weight.fill_(value)
    refuse(images(), f"image encoder makes {words} of a sound image", "Download", encoder=damaged)


def test_an_encoder_without_projection_serves_a_plus_adapter(world, encode, encoder):
    """Files for plus adapters may have none: ComfyUI leaves whatever is in memory."""
    bare = copy.deepcopy(encoder)
    bare.model.visual_projection.weight.fill_(torch.nan)
    plus = world.new_adapter(world.model, kind="plus", name="plus")
    assert torch.isfinite(encode(images(), bare, plus).args[0].positive.image).all()


def test_a_damaged_adapter(pack, world, refuse):
    """Files are checked when they are read; this is what a merge of adapters in memory could give."""
    adapter = world.new_adapter(world.model, name="damaged")
    next(adapter.adapter.projector.parameters()).fill_(torch.inf)
    refuse(images(2), "damaged.safetensors makes tokens with NaN or infinity", adapter=adapter)


def test_the_projector_runs_once(world, encode):
    """Other weights in Apply IP Adapter make other keys and values of the same tokens."""
    prompt = encode(images()).args[0]
    world.adapter.adapter.projector.register_forward_pre_hook(lambda *_: calls.append(1))
    calls = []
    for weight in (0.3, 0.6):
        world.apply(world.model, world.adapter, prompt, weight=weight)
    assert not calls
    world.apply(world.model, world.adapter, world.new_prompt(world.adapter, seed=77))
    assert calls
    world.adapter.adapter.projector._forward_pre_hooks.clear()
