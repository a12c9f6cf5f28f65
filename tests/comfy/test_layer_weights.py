"""Layer Weights, the boost of the precise types, and Apply IP Adapter without an image prompt."""

from __future__ import annotations

import pytest
import torch


def factors(pack, family="SD1.5", **options):
    return pack.LayerWeights.execute(family, **options).args[0]


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("groups", "layers"),
    [
        ({"composition": 0.0}, [*range(4), *range(6, 16)]),
        ({"early": 0.0, "composition": 0.0, "middle": 0.0, "content": 0.0, "detail": 0.0}, range(9, 13)),
    ],
)
def test_only_these_transformers_get_a_patch(pack, world, groups, layers):
    patched = world.apply(world.model, world.adapter, world.prompt, layer_weights=factors(pack, **groups))
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    sites = pack.core.cross_attention_sites(world.model.get_model_object("diffusion_model"))
    assert set(patches) == {site.block for site in sites if site.transformer_index in layers}


def test_sliders_and_text_are_the_same(pack, world):
    by_sliders = factors(pack, style=1.5, early=0.0, composition=0.0, middle=0.0, content=0.0, detail=0.0)
    by_text = factors(pack, layers="9:1.5, 10:1.5\n11:1.5, 12:1.5")
    assert by_sliders == by_text
    images = [
        world.sample(world.apply(world.model, world.adapter, world.prompt, layer_weights=given, weight=0.7))
        for given in (by_sliders, by_text)
    ]
    assert torch.equal(*images) and not torch.allclose(images[0], world.base, atol=0.1)


def test_all_at_one_changes_nothing(pack, world):
    patched = world.apply(world.model, world.adapter, world.prompt, layer_weights=factors(pack))
    assert torch.equal(world.sample(patched), world.sample(world.apply(world.model, world.adapter, world.prompt)))


def test_half_of_all_layers_is_half_the_weight(pack, world):
    text = ",".join(f"{index}:0.5" for index in range(16))
    half = world.apply(world.model, world.adapter, world.prompt, layer_weights=factors(pack, layers=text))
    close(world.sample(half), world.sample(world.apply(world.model, world.adapter, world.prompt, weight=0.5)))


def test_with_a_weight_type(pack, world):
    """Of the style layers, those of the first half alone: the two are multiplied."""
    options = {"weight_type": "style transfer", "layer_weights": factors(pack, style=0.0, detail=0.0)}
    patched = world.apply(world.model, world.adapter, world.prompt, **options)
    want = factors(pack, layers="0:1, 1:1, 2:1, 3:1")
    same = world.apply(world.model, world.adapter, world.prompt, layer_weights=want)
    assert torch.equal(world.sample(patched), world.sample(same))


def test_sdxl(pack, world):
    model = world.new_model("sdxl")
    adapter = world.new_adapter(model)
    prompt = world.new_prompt(adapter)
    style = world.apply(model, adapter, prompt, layer_weights=factors(pack, "SDXL", layers="6:1"))
    want = world.apply(model, adapter, prompt, weight_type="style transfer")
    assert torch.equal(world.sample(style, steps=1), world.sample(want, steps=1))
    with pytest.raises(pack.core.AdapterError, match=r"are for SD1\.5, with 6, 1 and 9"):
        world.apply(model, adapter, prompt, layer_weights=factors(pack, "SD1.5"))


def test_what_leaves_nothing_is_refused(pack, world):
    with pytest.raises(pack.core.AdapterError, match="layer_weights are 0 in all layers in which weight_type 'comp"):
        options = {"weight_type": "composition", "layer_weights": factors(pack, composition=0.0)}
        world.apply(world.model, world.adapter, world.prompt, **options)
    nothing = factors(pack, **dict.fromkeys(pack.core.LAYER_GROUPS, 0.0)), factors(pack, layers="3:0")
    for given in nothing:
        for weight_type in ("linear", "composition"):
            options = {"weight_type": weight_type, "layer_weights": given}
            with pytest.raises(pack.core.AdapterError, match=r"layer_weights are 0 in all layers, so the .*Raise one"):
                world.apply(world.model, world.adapter, world.prompt, **options)
        off = world.apply(world.model, world.adapter, world.prompt, weight=0.0, layer_weights=given)
        assert torch.equal(world.sample(off), world.base)
    off = world.apply(world.model, world.adapter, world.prompt, weight=0.0, layer_weights=factors(pack, layers="1:1"))
    assert torch.equal(world.sample(off), world.base)


def test_a_text_and_moved_sliders(pack, caplog):
    factors(pack, layers="1:1", style=1.0)
    assert not caplog.text
    factors(pack, layers="1:1", style=0.5, detail=2.0)
    assert "layers is used instead of the sliders; style, detail have no effect" in caplog.text
    with pytest.raises(pack.core.AdapterError, match=r"entry 1, '16:1', names transformer 16; SD1\.5 has"):
        factors(pack, layers="16:1")


@pytest.mark.parametrize("weight_type", ["style transfer precise", "composition precise"])
def test_boost(pack, world, weight_type):
    """In parts of weight; 0 leaves the type without its precision."""

    def sampled(**options):
        return world.sample(world.apply(world.model, world.adapter, world.prompt, **options))

    precise = {"weight_type": weight_type, "weight": 0.6}
    assert torch.equal(sampled(**precise), sampled(**precise, boost=1.0))
    assert torch.equal(sampled(**precise, boost=0.0), sampled(weight_type=weight_type[:-8], weight=0.6))
    patched = world.apply(world.model, world.adapter, world.prompt, **precise, boost=2.0)
    sites = pack.core.cross_attention_sites(world.model.get_model_object("diffusion_model"))
    weights = pack.core.layer_weights(weight_type, "sd15", 0.6, boost=1.2)
    assert all(layer.weight for layer in weights if layer.swapped)
    want = pack.install.apply_prompt(world.model, world.adapter, world.prompt, node="Test", weights=weights)
    assert torch.equal(world.sample(patched), world.sample(want))
    assert not torch.allclose(world.sample(patched), sampled(**precise), atol=1e-2)
    assert len(sites) == 16


def test_a_boost_that_nothing_uses_is_logged(world, caplog):
    world.apply(world.model, world.adapter, world.prompt, boost=2.0)
    assert "boost 2 acts with the precise weight types only, not with 'linear'" in caplog.text


def test_without_an_image_prompt_the_model_is_passed_on(pack, world):
    """As when Encode Image Prompt is bypassed or muted: ComfyUI leaves the input out, or passes None."""
    execute = pack.ApplyIPAdapter.execute
    assert execute(world.model, world.adapter).args[0] is world.model
    assert execute(world.model, world.adapter, None, attn_mask=torch.zeros(1, 8, 8)).args[0] is world.model


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "middle is connected to an output that has nothing"), (9.0, "middle is 9.0. Choose a number from -1 to 5")],
)
def test_what_comes_over_a_wire_into_a_slider(pack, value, message):
    """The sliders are one **groups of the function; they are looked at as every other input."""
    with pytest.raises(pack.core.AdapterError, match=message):
        factors(pack, middle=value)


def test_folded_inputs(pack):
    import inspect

    from comfy_api.latest import io

    inputs = {item.id: item for item in pack.ApplyIPAdapter.define_schema().inputs}
    known = "advanced" in inspect.signature(io.Float.Input).parameters
    for name in ("boost", "embeds_scaling"):
        assert getattr(inputs[name], "advanced", None) is (True if known else None)
    assert not getattr(inputs["weight"], "advanced", None)
