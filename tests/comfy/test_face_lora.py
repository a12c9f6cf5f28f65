"""The LoRA inside FaceID files: the weights themselves, and ComfyUI's own LoRA loader beside it."""

from __future__ import annotations

import itertools

import pytest
import torch

LORA_PARTS = ("to_q", "to_k", "to_v", "to_out")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request, world, pack):
    """A tiny model, its sites, and a FaceID adapter with a LoRA."""
    with torch.inference_mode():
        model = world.new_model(request.param)
    sites = pack.core.cross_attention_sites(model.model.diffusion_model)
    return model, sites, new_faceid(world, pack, sites)


def new_faceid(world, pack, sites, name="face", seed=11):
    import comfy.ops

    with torch.inference_mode():
        widths = [site.dim for site in sites]
        spec = pack.core.new_spec("faceid", widths, sites[0].cross_attention_dim, num_tokens=4, lora_rank=3)
        adapter = pack.core.IPAdapter(spec, operations=comfy.ops.manual_cast)
        world.randomise(adapter, seed, scale=0.2)
        return pack.types.manage(f"{name}.safetensors", adapter.eval())


def patched(pack, model, ip_adapter, sites, strength):
    clone = model.clone()
    pack.lora.add_lora(clone, ip_adapter, sites, strength)
    return clone


def weights(model):
    """The weights that ComfyUI calculates with; those of a model that is still loaded are put back before."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    model.patch_model()
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    model.unpatch_model()
    return state


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert (value - expected[key]).abs().max() <= tolerance, key


def diffusers_ids(pack, model):
    """ComfyUI's weight name of each part of each layer id, by ComfyUI's own table of diffusers' names."""
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    names = {name.rsplit(".to_", 1)[0] for name in table if ".attn" in name and ".to_" in name}
    ids = pack.core.layers.attention_ids(names)
    keys = {}
    for name, id in ids.items():
        for part in LORA_PARTS:
            layer = f"{name}.{'to_out.0' if part == 'to_out' else part}.weight"
            keys[id, part] = layer, f"diffusion_model.{table[layer]}"
    return keys


def test_direct_arithmetic(family, pack):
    model, sites, ip_adapter = family
    before = weights(model.clone())
    after = weights(patched(pack, model, ip_adapter, sites, 0.7))
    keys = diffusers_ids(pack, model)
    assert len(keys) == 8 * len(sites)
    for (id, part), (_, key) in keys.items():
        update = ip_adapter.lora.part(id, part)
        change = 0.7 * update.up.weight @ update.down.weight
        assert change.abs().max() > 0.01
        assert torch.allclose(after[key], before[key] + change, atol=1e-5)
    untouched = set(before) - {key for _, key in keys.values()}
    assert untouched and all(torch.equal(before[key], after[key]) for key in untouched)
    assert_equal(weights(model.clone()), before, 0.0)


def test_equal_to_the_separate_file_in_comfyuis_own_loader(family, pack, world):
    """h94 publishes the same LoRA as a file of its own, in kohya's names without alpha."""
    import comfy.sd

    model, sites, ip_adapter = family
    file = {}
    for (id, part), (name, _) in diffusers_ids(pack, model).items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        update = ip_adapter.lora.part(id, part)
        file[f"{stem}.lora_up.weight"], file[f"{stem}.lora_down.weight"] = update.up.weight, update.down.weight
    (own, _) = comfy.sd.load_lora_for_models(model, None, file, 0.6, 0.0)
    ours = patched(pack, model, ip_adapter, sites, 0.6)
    assert_equal(weights(ours), weights(own), 1e-6)
    expected, base = world.sample(own), world.sample(model)
    assert (world.sample(ours) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - base).abs().max() > 1e-2 * base.abs().max()
    assert torch.equal(world.sample(model), base)  # the model that is shared is as it was


def test_off(family, pack, world):
    model, sites, ip_adapter = family
    assert patched(pack, model, ip_adapter, sites, 0.0).patches == model.patches == {}
    plain = world.new_adapter(model, name="plain")
    assert plain.lora is None
    assert patched(pack, model, plain, sites, 1.0).patches == {}
    with pytest.raises(pack.core.AdapterError, match="lora_strength is nan"):
        patched(pack, model, ip_adapter, sites, float("nan"))


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(0.8, 0.8, 0.8), (0.5, 0.9, 0.9), (0.9, 0.5, 0.9), (0.4, 0, 0.4)]
)
def test_two_prompts_of_a_file_apply_its_lora_once(family, pack, world, first, second, expected):
    """Two faces in two regions: also where the file was loaded by two nodes."""
    model, sites, ip_adapter = family
    again = new_faceid(world, pack, sites)  # the same weights in other tensors
    upstream = patched(pack, model, ip_adapter, sites, first)
    chained = patched(pack, upstream, again, sites, second)
    once = patched(pack, model, ip_adapter, sites, expected)
    assert {key: len(value) for key, value in chained.patches.items()} == dict.fromkeys(once.patches, 1)
    assert_equal(weights(chained), weights(once), 0.0)
    assert {patch[0] for patches in upstream.patches.values() for patch in patches} == {first}  # as it was


def test_loras_of_other_files_add_up(family, pack, world):
    model, sites, ip_adapter = family
    other = new_faceid(world, pack, sites, name="other", seed=12)
    both = patched(pack, patched(pack, model, ip_adapter, sites, 0.5), other, sites, 0.25)
    before, after = weights(model.clone()), weights(both)
    for (id, part), (_, key) in diffusers_ids(pack, model).items():
        one, two = ip_adapter.lora.part(id, part), other.lora.part(id, part)
        change = 0.5 * one.up.weight @ one.down.weight + 0.25 * two.up.weight @ two.down.weight
        assert torch.allclose(after[key], before[key] + change, atol=1e-5)


def test_weights_are_patched_once_while_only_the_prompt_changes(world, pack, monkeypatch):
    """A model is patched again when its patches change, not whenever Apply runs again."""
    from comfy.weight_adapter import LoRAAdapter

    with torch.inference_mode():
        model = world.new_model("sd15")
    sites = pack.core.cross_attention_sites(model.model.diffusion_model)
    ip_adapter, other = new_faceid(world, pack, sites), new_faceid(world, pack, sites, seed=12)
    calculate, calls = LoRAAdapter.calculate_weight, []

    def spy(*args, **kwargs):
        calls.append(args[2])
        return calculate(*args, **kwargs)

    monkeypatch.setattr(LoRAAdapter, "calculate_weight", spy)
    prompt = pack.types.ImagePrompt(pack.types.EncodedImages(face=torch.randn(1, 512)), adapter=ip_adapter.name)
    count, runs = 8 * len(sites), []
    for adapter, weight, strength in [
        (ip_adapter, 1, 0.6),
        (ip_adapter, 0.5, 0.6),
        (ip_adapter, 0.5, 1.0),
        (other, 0.5, 1.0),
    ]:
        calls.clear()
        runs.append(world.sample(world.apply(model, adapter, prompt, weight=weight, lora_strength=strength), steps=1))
        assert len(calls) == (0 if len(runs) == 2 else count)
    assert not any(torch.equal(one, two) for one, two in itertools.pairwise(runs))


def test_pruned_model(world, pack):
    """Layer ids are places in the tree, so a UNet without some transformers has its own."""
    with torch.inference_mode():
        model = world.new_model(
            "sd15", transformer_depth=[1, 0, 1, 1, 1, 0, 0, 0], transformer_depth_output=[1] * 6 + [0] * 6
        )
    sites = pack.core.cross_attention_sites(model.model.diffusion_model)
    ip_adapter = new_faceid(world, pack, sites)
    changed = patched(pack, model, ip_adapter, sites, 1.0)
    assert len(changed.patches) == 8 * len(sites)
    before, after = weights(model.clone()), weights(changed)
    attention = {key for key in before if ".attn" in key and ".to_" in key and key.endswith("weight")}
    assert attention == set(changed.patches) == {key for key in before if not torch.equal(before[key], after[key])}


def test_the_lora_does_not_go_to_the_device_with_the_adapter(family, pack):
    _, _, ip_adapter = family
    assert ip_adapter.adapter.lora is None and ip_adapter.spec.lora_rank == 3
    assert not [key for key in ip_adapter.patcher.model.state_dict() if "lora" in key]
    assert sum(parameter.numel() for parameter in ip_adapter.lora.parameters()) > 0
