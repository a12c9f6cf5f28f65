"""Image Prompt Regions equals the same graph built by hand: Apply IP Adapter, Conditioning (Set Mask), Combine."""

from __future__ import annotations

import pytest
import torch

LEFT, RIGHT = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
LEFT[..., :40] = 1.0
RIGHT[..., 24:] = 0.8


@pytest.fixture
def regions(pack, world):
    def regions(positive=None, **inputs):
        positive = positive or world.conds()[0]
        return pack.ImagePromptRegions.execute(world.model, world.adapter, positive, **inputs).args

    return regions


def set_mask(conditioning, mask):
    import nodes

    return nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_equals_the_graph_by_hand(comfyui, world, regions):
    import nodes

    first, second = world.new_prompt(world.adapter, seed=41), world.new_prompt(world.adapter, seed=42, images=2)
    positive, negative = world.conds()
    text_1, text_2 = world.conds(seed=43)
    model, conditioning = regions(
        positive,
        weight_type="ease in",
        mask_1=LEFT,
        image_prompt_1=first,
        positive_1=text_1,
        weight_1=0.7,
        mask_3=RIGHT,
        image_prompt_3=second,
        positive_3=text_2,
        weight_3=1.2,
    )
    want = world.model
    for prompt, mask, weight in ((first, LEFT, 0.7), (second, RIGHT, 1.2)):
        options = {"attn_mask": mask, "weight": weight, "weight_type": "ease in"}
        want = world.apply(want, world.adapter, prompt, **options)
    by_hand = positive
    for text, mask in ((text_1, LEFT), (text_2, RIGHT)):
        by_hand = nodes.ConditioningCombine().combine(by_hand, set_mask(text, mask))[0]
    got = world.sample(model, positive=conditioning, negative=negative)
    close(got, world.sample(want, positive=by_hand, negative=negative))
    assert not torch.allclose(got, world.sample(want), atol=0.1), "the texts of the regions act"
    assert len(positive) == 1 and "mask" not in text_1[0][1], "what came in stays as it was"


def test_a_region_needs_no_text_and_no_image_prompt(world, regions):
    text = world.conds(seed=43)[0]
    positive = world.conds()[0]
    model, same = regions(positive, mask_1=LEFT, image_prompt_1=world.prompt)
    assert same is positive
    close(world.sample(model), world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)))
    same_model, conditioning = regions(positive, mask_2=LEFT, positive_2=text)
    assert same_model is world.model and len(conditioning) == 2
    assert torch.equal(conditioning[1][1]["mask"], set_mask(text, LEFT)[0][1]["mask"])


def test_incomplete_regions_are_left_out_and_named(world, regions, caplog):
    positive = world.conds()[0]
    model, conditioning = regions(positive, mask_1=LEFT, image_prompt_2=world.prompt, mask_4=RIGHT, positive_3=positive)
    assert model is world.model and conditioning is positive
    for words in (
        "region 1 is left out, because it has no image_prompt_1 and positive_1",
        "region 2 is left out, because it has no mask_2",
        "region 3 is left out, because it has no mask_3",
        "no region has a mask and an image prompt or a text",
    ):
        assert words in caplog.text


def test_masks_that_do_not_fit(pack, world, regions):
    small = torch.ones(1, 32, 64)
    both = {"image_prompt_1": world.prompt, "image_prompt_2": world.prompt}
    with pytest.raises(pack.core.AdapterError, match="differ in size: mask_1 64 x 64, mask_2 64 x 32"):
        regions(mask_1=LEFT, mask_2=small, **both)
    empty = torch.zeros(1, 64, 64)
    with pytest.raises(pack.core.AdapterError, match="mask_2 is 0 everywhere, so the image prompt would act nowhere"):
        regions(mask_1=LEFT, mask_2=empty, positive_2=world.conds()[0], **both)
    with pytest.raises(pack.core.AdapterError, match="mask_3 is 0 everywhere, so the text would act nowhere"):
        regions(mask_1=LEFT, mask_2=LEFT, mask_3=empty, positive_3=world.conds()[0], **both)
    dot = torch.zeros(1, 512, 512)
    dot[:, 3, 3] = 1.0
    model, _ = regions(mask_1=dot, image_prompt_1=world.prompt)
    with pytest.raises(pack.core.AdapterError, match="mask_1 is 0 at every place of the 16 x 16 latent"):
        world.sample(model)


def test_a_weight_of_zero_switches_one_region_off(world, regions):
    inputs = {"mask_1": LEFT, "image_prompt_1": world.prompt, "mask_2": RIGHT, "image_prompt_2": world.prompt}
    model, _ = regions(**inputs, weight_2=0.0)
    close(world.sample(model), world.sample(world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)))


def test_warnings_name_this_node(world, regions, caplog):
    masks = torch.cat([LEFT, LEFT])
    model, _ = regions(mask_1=masks, image_prompt_1=world.prompt)
    world.sample(model)
    assert "Image Prompt Regions: mask_1 has 2 masks" in caplog.text and "Apply IP Adapter" not in caplog.text


def test_former_names_of_weight_types(pack):
    assert pack.ImagePromptRegions.validate_inputs("style transfer (SDXL)") is True
    assert "Unknown weight type" in pack.ImagePromptRegions.validate_inputs("x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "weight_2 is connected to an output that has nothing"),
        (float("nan"), "weight_2 is nan. Choose a number from -1 to 5"),
    ],
)
def test_what_comes_over_a_wire_into_a_weight(pack, world, regions, value, message):
    with pytest.raises(pack.core.AdapterError, match=message):
        regions(mask_2=LEFT, image_prompt_2=world.prompt, weight_2=value)


@pytest.mark.parametrize("batch", [3, 4])
def test_the_last_mask_is_for_all_further_images(world, regions, batch):
    """Of the text as of the image prompt; ComfyUI alone repeats the masks of a text, or fails where they do not fit."""
    masks = torch.cat([LEFT, RIGHT])
    all_masks = torch.cat([masks, RIGHT.expand(batch - 2, -1, -1)])
    text, _ = world.conds(seed=43)
    got, want = (
        world.sample(model, positive=conditioning, batch=batch)
        for model, conditioning in (
            regions(mask_1=given, image_prompt_1=world.prompt, positive_1=text) for given in (masks, all_masks)
        )
    )
    close(got, want)
