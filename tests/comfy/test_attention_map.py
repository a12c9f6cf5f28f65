"""Attention maps: what is recorded is what acted, and the images stay the same."""

from __future__ import annotations

import pytest
import torch

LEFT, RIGHT = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
LEFT[..., :8] = 1.0
RIGHT[..., 8:] = 1.0
IMAGE = torch.full((1, 128, 128, 3), 0.5)


@pytest.fixture
def recorded(pack, world):
    """A model and its record; `options` of Apply IP Adapter."""

    def recorded(model=None, **options):
        patched = model or world.apply(world.model, world.adapter, world.prompt, **options)
        return pack.RecordAttentionMap.execute(patched).args

    return recorded


@pytest.fixture
def heat(pack):
    """The map [B, H, W] in absolute shares."""

    def heat(record, image=IMAGE, **options):
        return pack.ImagePromptAttentionMap.execute(record, image, scale="absolute", **options).args[1]

    return heat


def test_the_images_stay_the_same(world, recorded):
    options = {"attn_mask": LEFT, "end_at": 0.6}
    model, _ = recorded(**options)
    want = world.sample(world.apply(world.model, world.adapter, world.prompt, **options), steps=3, batch=2)
    assert torch.equal(world.sample(model, steps=3, batch=2), want)


def test_the_share_of_the_attention(pack, world, recorded, heat, monkeypatch):
    """Worked out from what the layers of one step added, in a run with the positive branch alone."""
    terms = {}
    original = pack.record.Record.add

    def add(self, place, key, term, options):
        magnitudes = term.abs().mean(-1).unflatten(1, options["activations_shape"][-2:])
        terms.setdefault(place, []).append(magnitudes)
        return original(self, place, key, term, options)

    monkeypatch.setattr(pack.record.Record, "add", add)
    model, record = recorded()
    world.sample(model, cfg=1.0, steps=1)
    assert len(terms) == 16 and all(len(found) == 2 for found in terms.values())
    large = [
        [torch.nn.functional.interpolate(part[:, None], size=(16, 16), mode="bilinear")[0, 0] for part in found]
        for found in terms.values()
    ]
    want = torch.stack([image / (image + text) for text, image in large]).mean(0)
    got = record.heat("all", 0, 1)
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-4)
    assert float(got.min()) > 0.05 and float(got.max()) < 0.95
    assert heat(record).shape == (1, 128, 128)


def test_guidance_changes_nothing_of_the_first_step(world, recorded):
    """The negative rows are not counted, whether both branches come in one call or alone."""
    maps = []
    for cfg in (1.0, 5.0):
        model, record = recorded()
        world.sample(model, cfg=cfg, steps=2)
        maps.append(record.heat("all", 0, 1))
    torch.testing.assert_close(*maps, atol=1e-4, rtol=1e-3)


def test_a_mask(world, recorded, heat):
    model, record = recorded(attn_mask=LEFT)
    world.sample(model)
    made = heat(record)
    assert made[..., :56].min() > 0.01 and not made[..., 104:].any()  # the coarsest grid blurs


def test_prompts_one_by_one(world, recorded, heat):
    other = world.new_adapter(world.model, seed=31, name="b")
    first = world.apply(world.model, world.adapter, world.prompt, attn_mask=LEFT)
    model, record = recorded(world.apply(first, other, world.new_prompt(other), attn_mask=RIGHT))
    world.sample(model)
    both, left, right = (heat(record, prompt=number) for number in range(3))
    assert left[..., :56].min() > 0.01 and not left[..., 104:].any()
    assert right[..., 76:].min() > 0.01 and not right[..., :24].any()
    torch.testing.assert_close(both, left + right)


def test_a_prompt_that_is_off_keeps_its_number(pack, world, recorded, heat):
    first = world.apply(world.model, world.adapter, world.prompt, weight=0.0)
    assert torch.equal(world.sample(first), world.base)
    left = world.apply(first, world.adapter, world.prompt, attn_mask=LEFT)
    model, record = recorded(world.apply(left, world.adapter, world.prompt, weight=0.0))
    assert sum(len(items) for items in model.wrappers["apply_model"].values()) == 2, "no step calls what is off"
    world.sample(model)
    alone, alone_record = recorded(attn_mask=LEFT)
    world.sample(alone)
    assert torch.equal(heat(record, prompt=2), heat(alone_record))
    assert torch.equal(heat(record), heat(alone_record))
    for number in (1, 3):
        with pytest.raises(pack.core.AdapterError, match=rf"image prompt {number} is off \(weight 0\)"):
            heat(record, prompt=number)
    with pytest.raises(pack.core.AdapterError, match="prompt is 4; the recorded model has 3 image prompts"):
        heat(record, prompt=4)


def test_a_region_and_an_old_node_that_are_off_keep_their_numbers(pack, world, encoder, recorded, heat):
    regions = {"mask_1": LEFT, "image_prompt_1": world.prompt, "weight_1": 0.0}
    regions |= {"mask_2": RIGHT, "image_prompt_2": world.prompt}
    model, _ = pack.ImagePromptRegions.execute(world.model, world.adapter, world.conds()[0], **regions).args
    adapter, image = pack.wires.AdapterFile(world.adapter), torch.rand(1, 40, 40, 3)
    given = {"ipadapter": adapter, "clip_vision": encoder, "image": image}
    old = {cls.__name__: cls for cls in pack.register.OLD_NODES}["IPAdapterAdvanced"].apply_ipadapter
    model = old(model=old(model=model, weight=0.0, **given)[0], start_at=0.5, end_at=0.5, **given)[0]
    model, record = recorded(world.apply(model, world.adapter, world.prompt, attn_mask=LEFT))
    world.sample(model)
    for number in (1, 3, 4):
        with pytest.raises(pack.core.AdapterError, match=rf"image prompt {number} is off"):
            heat(record, prompt=number)
    right, left = (heat(record, prompt=number) for number in (2, 5))
    assert right[..., 76:].min() > 0.01 and left[..., :56].min() > 0.01
    assert not right[..., :24].any() and not left[..., 104:].any()


def test_steps(pack, world, recorded, heat):
    model, record = recorded(end_at=0.5)
    world.sample(model, steps=4)
    assert heat(record, end_at_step=2).min() > 0.01
    assert not heat(record, start_at_step=3).any()
    halves = [heat(record, start_at_step=start, end_at_step=start + 2) for start in (0, 2)]
    torch.testing.assert_close(heat(record), sum(halves) / 2, atol=1e-5, rtol=1e-4)
    with pytest.raises(pack.core.AdapterError, match="Steps from 4 up to 4 hold none of the 4 steps"):
        heat(record, start_at_step=4)


def test_layers(pack, world, recorded, heat):
    model, record = recorded(weight_type="composition")
    world.sample(model)
    torch.testing.assert_close(heat(record), heat(record, layers="composition"))
    with pytest.raises(pack.core.AdapterError, match="No image prompt acts in the layers 'style' of this model"):
        heat(record, layers="style")


def test_batches_areas_and_grown_batches(world, recorded, heat):
    model, record = recorded(attn_mask=torch.cat([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)]))
    world.sample(model, batch=2)
    made = heat(record, IMAGE.repeat(2, 1, 1, 1))
    assert not made[0].any() and made[1].min() > 0.01
    positive, negative = world.conds()
    model, record = recorded()
    area = [[positive[0][0], {**positive[0][1], "area": (16, 8, 0, 8), "strength": 1.0}]]
    world.sample(model, positive=area, negative=negative)
    made = heat(record)
    assert made[..., 76:].min() > 0.01 and not made[..., :52].any()


def test_a_record_is_of_one_run(world, recorded):
    model, record = recorded()
    world.sample(model)
    first = {entry: total.clone() for entry, total in record.sums.items()}
    world.sample(model)
    assert len(first) == 2 * 2 * 16, "two steps, the text and the image, sixteen transformers"
    assert first.keys() == record.sums.keys()
    assert all(torch.equal(total, record.sums[entry]) for entry, total in first.items())
    world.sample(model, steps=1)
    assert len(record.sums) == 2 * 16 and record.steps == 1


@pytest.fixture
def prompt(comfyui):
    """What ComfyUI sets while it executes a prompt."""
    from comfy_execution.utils import CurrentNodeContext

    return lambda name: CurrentNodeContext(name, "1")


def test_an_image_from_the_cache_keeps_the_map_of_its_run(world, recorded, heat, prompt, caplog):
    """ComfyUI keeps images of several prompts, and one record for all of them."""
    model, record = recorded()
    first, second = IMAGE.clone(), IMAGE.clone()
    with prompt("a"):
        world.sample(model, steps=1)
        one = heat(record, first)
    with prompt("a, another opacity"):
        assert torch.equal(heat(record, first), one)
    with prompt("b"):
        world.sample(model, steps=3)
    with prompt("a, once more"):
        assert torch.equal(heat(record, first), one)
    with prompt("c"):
        world.sample(model, steps=3)
        other = heat(record, second)
    with prompt("both"):
        assert torch.equal(heat(record, first), one) and torch.equal(heat(record, second), other)
    assert not torch.equal(one, other) and not caplog.text
    with prompt("d"):  # sampled again, with the image of another place
        world.sample(model, steps=3)
        assert torch.equal(heat(record, first), other)
    del first, second
    assert not record.drawn, "kept only as long as the images"


def test_an_image_from_the_cache_without_a_map_yet(world, recorded, heat, prompt, caplog):
    model, record = recorded()
    with prompt("a"):
        world.sample(model, steps=1)
    with prompt("the map is added"):
        heat(record, IMAGE.clone())
    assert not caplog.text
    with prompt("b"):
        world.sample(model, steps=2)
    with prompt("the image of a"):
        heat(record, image := IMAGE.clone())
        assert "took the image from its cache, and 2 runs of the sampler were recorded" in caplog.text
        caplog.clear()
        heat(record, image)
    assert not caplog.text


def test_sdxl_counts_the_layers_of_a_transformer_together(world, recorded):
    model = world.new_model("sdxl")
    adapter = world.new_adapter(model)
    model, record = recorded(world.apply(model, adapter, world.new_prompt(adapter)))
    world.sample(model, steps=1)
    assert len(record.sums) == 2 * 11
    assert record.heat("style", 0, 1).shape == (1, 16, 16)


def test_the_image_and_its_scale(pack, world, recorded):
    model, record = recorded(attn_mask=LEFT)
    world.sample(model)
    execute = pack.ImagePromptAttentionMap.execute
    drawn, made = execute(record, IMAGE).args
    assert drawn.shape == IMAGE.shape and float(made.max()) == pytest.approx(1.0)
    assert torch.equal(execute(record, IMAGE, opacity=0.0).args[0], IMAGE)
    absolute = execute(record, IMAGE, scale="absolute").args[1]
    torch.testing.assert_close(absolute / absolute.max(), made, atol=1e-5, rtol=1e-5)
    with pytest.raises(pack.core.AdapterError, match="There are 2 images and attention maps of 1"):
        execute(record, IMAGE.repeat(2, 1, 1, 1))


def test_what_is_connected_wrongly(pack, world, recorded, heat, caplog):
    model, record = recorded()
    with pytest.raises(
        pack.core.AdapterError, match=r"Nothing was recorded\. Connect the model of Record Attention Map"
    ):
        heat(record)
    with pytest.raises(pack.core.AdapterError, match="This model is recorded already"):
        recorded(model)
    assert not caplog.text
    late = world.apply(model, world.adapter, world.prompt)
    world.sample(late, steps=1)
    assert "an Apply IP Adapter comes after it and is not recorded" in caplog.text
    with pytest.raises(pack.core.AdapterError, match="prompt is 2; the recorded model has 1 image prompt"):
        heat(record, prompt=2)


def test_without_an_image_prompt(world, recorded, heat, caplog):
    """As when Encode Image Prompt is bypassed."""
    model, record = recorded(world.model)
    assert torch.equal(world.sample(model), world.base)
    assert "no image prompt acts in the connected model" in caplog.text
    assert not heat(record).any() and "so the map is empty" in caplog.text
    caplog.clear()
    _, record = recorded(weight=0.0)
    assert not heat(record).any() and "so the map is empty" in caplog.text


def test_a_compiled_model_is_refused(pack, world, recorded):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, _ = recorded()
    set_torch_compile_wrapper(model=model, backend="eager")
    with pytest.raises(pack.core.AdapterError, match="cannot look into a compiled model"):
        world.sample(model)


def test_a_sampler_that_enlarges_the_latent(pack, world, recorded, heat):
    """Its latents are larger than at the start, and are no parts of it: masks and maps are stretched to them."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    sampler = SamplerLCMUpscale.execute(1.5, 2, "bislerp").args[0]

    def sample(model):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
        text = world.conds()
        return comfy.sample.sample_custom(model, noise, 4.0, sampler, sigmas, *text, torch.zeros_like(noise), seed=5)

    model, record = recorded(attn_mask=LEFT)
    drawn = sample(model)
    assert drawn.shape[-2:] == (24, 24)
    assert not torch.allclose(drawn, sample(world.model), atol=1e-2)
    share = record.heat("all", 0, 4)[0]
    assert share.shape == (24, 24)
    assert share[:, :10].mean() > 10 * share[:, 14:].mean()
