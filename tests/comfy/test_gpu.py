"""On a GPU: what the nodes do there equals the CPU's fp32 result, under ComfyUI's memory management.

    COMFYUI_PATH=... COMFYUI_DEVICE=cuda python -m pytest tests/comfy/test_gpu.py

With COMFYUI_DYNAMIC_VRAM=1 as well, weights are streamed as ComfyUI does by default on NVIDIA GPUs. COMFYUI_DEVICE=cpu
runs all that makes sense without a GPU.
"""

from __future__ import annotations

import gc
import json
import os

import pytest
import torch

DEVICE = os.environ.get("COMFYUI_DEVICE", "")
DYNAMIC = bool(os.environ.get("COMFYUI_DYNAMIC_VRAM"))
EPSILON = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
BATCH = 4
LEFT = torch.zeros(1, 16, 16)
LEFT[..., :8] = 1.0
SMALL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": 0,
    "transformer_depth_output": [1, 0],
}

pytestmark = [
    pytest.mark.skipif(not DEVICE, reason="COMFYUI_DEVICE is not set: cuda runs these tests on a GPU"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no other memory to move to")


@pytest.fixture(scope="module")
def device(comfyui):
    import comfy.model_management

    return str(comfy.model_management.get_torch_device())


@pytest.fixture(autouse=True)
def _nothing_loaded(comfyui):
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()


def faceid(world, pack):
    def apply(model):
        adapter = world.new_adapter(model, kind="faceid", seed=5)
        face = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(6)))
        prompt = pack.types.ImagePrompt(pack.types.EncodedImages(face=face), adapter=adapter.name)
        return world.apply(model, adapter, prompt)

    return apply


def plus(world, pack):
    def apply(model):
        adapter = world.new_adapter(model, kind="plus", seed=7)
        features = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(8))
        encoded = [pack.types.EncodedImages(feature[None]) for feature in features]
        return world.apply(model, adapter, pack.types.ImagePrompt(*encoded, adapter.name))

    return apply


def stacked(world, pack):
    def apply(model):
        adapter = world.new_adapter(model)
        first = world.apply(model, adapter, world.new_prompt(adapter), weight=0.7, attn_mask=LEFT)
        second = world.apply(first, adapter, world.new_prompt(adapter, seed=9, images=2), end_at=0.6)
        return world.apply(second, adapter, world.new_prompt(adapter, seed=10), weight=0.5, embeds_scaling="K+V")

    return apply


def regions(world, pack):
    def apply(model):
        adapter = world.new_adapter(model)
        inputs = {"mask_1": LEFT, "mask_2": 1 - LEFT}
        inputs |= {f"image_prompt_{number}": world.new_prompt(adapter, seed=number) for number in (1, 2)}
        return pack.ImagePromptRegions.execute(model, adapter, [], **inputs).args[0]

    return apply


def one_each(world, pack):
    def apply(model):
        adapter = world.new_adapter(model)
        features = torch.randn(BATCH, 48, generator=torch.Generator().manual_seed(11))
        encoded = pack.types.EncodedImages(features, weights=(1.0, 0.5, 0.0, 2.0))
        prompt = pack.types.ImagePrompt(encoded, adapter=adapter.name, one_each=True)
        frames = pack.WeightSchedule.execute("frames", "1, 0.5").args[0]
        return world.apply(model, adapter, prompt, weight_schedule=frames)

    return apply


def schedule(world, pack):
    def apply(model):
        adapter = world.new_adapter(model)
        steps = pack.WeightSchedule.execute("steps", "1, 0.3").args[0]
        return world.apply(model, adapter, world.new_prompt(adapter), weight_schedule=steps)

    return apply


CASES = [plus, faceid, stacked, regions, one_each, schedule]


def error(got, want):
    """The mean difference in parts of the result's scale."""
    assert got.isfinite().all()
    return float((got.float() - want).abs().mean() / want.abs().mean())


@pytest.fixture(scope="module")
def compare(world, pack, device):
    """A case on the device, in a dtype, against fp32 on the CPU: no further from it than the model alone is, but for
    the dtype's rounding, and far nearer than the adapter's own effect.
    """
    wanted = {}

    def want(family, case, batch):
        if (family, case, batch) not in wanted:
            model = world.new_model(family)
            wanted[family, case, batch] = world.sample(case(world, pack)(model) if case else model, batch=batch)
        return wanted[family, case, batch]

    def compare(family, case, dtype, batch=1, **made):
        model = world.new_model(family, dtype=dtype, device=device, **made)
        plain = error(world.sample(model, batch=batch), want(family, None, batch))
        patched = case(world, pack)(model)
        off = error(world.sample(patched, batch=batch), want(family, case, batch))
        effect = error(want(family, case, batch), want(family, None, batch))
        assert off < 3 * max(plain, EPSILON[dtype]) and off < effect / 4, (off, plain, effect)
        return patched

    return compare


@pytest.mark.parametrize("dtype", EPSILON, ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_equals_fp32_on_the_cpu(compare, family, case, dtype):
    patched = compare(family, case, dtype, batch=BATCH if case is one_each else 1)
    for pair in keys_values(patched):
        assert all(part.dtype is dtype and part.device.type == "cpu" for part in pair)


def keys_values(model):
    return [pair for items in applications(model) for pair in items.pairs.values()]


def applications(model):
    import comfy.patcher_extension

    wrappers = model.wrappers[comfy.patcher_extension.WrappersMP.APPLY_MODEL]
    return [item for items in wrappers.values() for item in items if hasattr(item, "pairs")]


@pytest.mark.parametrize("case", [plus, faceid, stacked])
@pytest.mark.parametrize("way", ["--novram", "--reserve-vram"])
def test_with_the_weights_in_the_computer_s_memory(world, pack, device, monkeypatch, case, way):
    """What ComfyUI makes of these arguments: the UNet's weights go to the GPU layer by layer."""
    import comfy.model_management

    model = world.new_model(dtype=torch.float16, device=device)
    patched = case(world, pack)(model)
    want = world.sample(patched)
    comfy.model_management.unload_all_models()
    if way == "--novram":
        monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    else:
        monkeypatch.setattr(comfy.model_management, "EXTRA_RESERVED_VRAM", 1 << 40)
    got = world.sample(patched)
    if DEVICE == "cuda" and not DYNAMIC:
        assert patched.loaded_size() < patched.model_size() / 2
    assert error(got, want.float()) < 5e-3  # a LoRA is added in another order


@pytest.mark.parametrize("case", [plus, faceid])
def test_weights_in_fp8(world, pack, device, case):
    made = {"dtype": torch.float8_e4m3fn}
    want = world.sample(case(world, pack)(world.new_model(**made, cast=torch.float32)))
    model = world.new_model(**made, cast=torch.float16, device=device)
    patched = case(world, pack)(model)
    # A LoRA is rounded into the fp8 weights, with a noise of its own on a GPU.
    assert error(world.sample(patched), want) < (0.2 if case is faceid else 1e-2)
    assert error(world.sample(model), want) > 0.05 and keys_values(patched)[0].key.dtype is torch.float16


@pytest.mark.parametrize("case", CASES)
def test_unloaded_between_two_runs(world, pack, device, case):
    import comfy.model_management

    model = world.new_model(dtype=torch.float16, device=device)
    patched = case(world, pack)(model)
    want = world.sample(patched, batch=2)
    comfy.model_management.unload_all_models()
    assert error(world.sample(patched, batch=2), want.float()) < 2e-3
    world.sample(model)  # a clone of it, so that the patches are taken out
    assert error(world.sample(patched, batch=2), want.float()) < 2e-3


@on_gpu
@pytest.mark.skipif(DYNAMIC, reason="the streamed weights are in memory that PyTorch does not count")
@pytest.mark.parametrize("case", CASES)
def test_nothing_of_a_run_stays_on_the_gpu(world, pack, device, case):
    model = world.new_model(dtype=torch.float16, device=device)
    patched = case(world, pack)(model)
    held = []
    for _ in range(3):
        world.sample(patched, batch=2)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2], held
    after = world.sample(model, batch=2)
    del after
    gc.collect()
    assert torch.cuda.memory_allocated() <= held[2]


def test_encoder_and_adapter_take_turns(world, pack, encoder, device, vision, tmp_path):
    """Encoded on the GPU, as on the CPU; and again after everything was moved off it."""
    import comfy.clip_vision
    import comfy.model_management

    images = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(12))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**vision, "model_type": "clip_vision_model"}))
    on_cpu = comfy.clip_vision.ClipVisionModel(str(config))
    world.randomise(on_cpu.model, seed=31)
    on_cpu.model.float()
    on_cpu.load_device = on_cpu.patcher.load_device = torch.device("cpu")
    model = world.new_model(dtype=torch.float16, device=device)
    adapter = world.new_adapter(model)

    def encode(with_encoder):
        return pack.EncodeImagePrompt.execute(adapter, with_encoder, images).args[0]

    want, first = encode(on_cpu), encode(encoder)
    assert error(first.positive.image, want.positive.image) < 1e-2 and first.positive.image.device.type == "cpu"
    patched = world.apply(model, adapter, first)
    sampled = world.sample(patched)
    comfy.model_management.unload_all_models()
    again = world.sample(world.apply(model, adapter, encode(encoder)))
    assert error(again, sampled.float()) < 1e-3
    assert error(sampled, world.sample(model).float()) > 0.05


def test_attention_map(world, pack, device):
    def heat(**made):
        model = world.new_model(**made)
        recorded, record = pack.RecordAttentionMap.execute(stacked(world, pack)(model)).args
        world.sample(recorded)
        image = torch.full((1, 128, 128, 3), 0.5)
        return pack.ImagePromptAttentionMap.execute(record, image, scale="absolute").args[1]

    want, got = heat(), heat(dtype=torch.float16, device=device)
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-2, rtol=0)


@on_gpu
def test_the_torch_compile_node(world, pack, device):
    import comfy_extras.nodes_torch_compile as extras

    torch._dynamo.reset()
    plain = world.new_model(dtype=torch.float16, device=device, **SMALL)
    adapter = world.new_adapter(plain)
    prompts = [world.new_prompt(adapter, seed=seed, images=seed) for seed in (1, 2)]
    compiled = extras.TorchCompileModel.execute(plain, "inductor").args[0]
    for prompt in prompts:
        got = world.sample(world.apply(compiled, adapter, prompt), steps=1)
        want = world.sample(world.apply(plain, adapter, prompt), steps=1)
        assert error(got, want.float()) < 5e-3
    assert error(world.sample(compiled, steps=1), want.float()) > 0.02
    torch._dynamo.reset()
