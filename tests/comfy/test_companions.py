"""Apply IP Adapter beside other nodes that change a model or its conditioning, before it and after it.

The reference adds the image attention by PyTorch hooks on the attention modules, so it takes no part in how ComfyUI
patches a model: neither the patches, nor the wrappers, nor the options of a step.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def reference(pack: Any, model: Any, ip_adapter: Any, prompt: Any, weight: float = 1.0) -> Iterator[None]:
    """Add the image attention to every cross-attention of the UNet; the rows follow `cond_or_uncond`."""
    unet = model.get_model_object("diffusion_model")
    tokens = pack.types.project(ip_adapter, prompt)
    pairs = ip_adapter.adapter.keys_values(tokens)
    rows: list[int] = []
    queries: dict[int, torch.Tensor] = {}

    def called(module: Any, args: Any, kwargs: Any) -> None:
        options = kwargs.get("transformer_options") or {}
        chunks = options.get("cond_or_uncond", [0])
        rows[:] = [index for index in chunks for _ in range(len(args[0]) // len(chunks))]

    def term(layer: int, heads: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            key, value = (part[rows] for part in pairs[layer])
            image = pack.core.attention.image_attention(queries.pop(layer), key, value, heads, weight=weight)
            return (args[0] + image, *args[1:])

        return hook

    handles = [unet.register_forward_pre_hook(called, with_kwargs=True)]
    for layer, site in enumerate(pack.core.cross_attention_sites(unet)):
        stage, number, index = site.block
        block = unet.middle_block if stage == "middle" else getattr(unet, f"{stage}_blocks")[number]
        transformer = next(child for child in block.children() if hasattr(child, "transformer_blocks"))
        attention = transformer.transformer_blocks[index].attn2

        def remember(module: Any, args: Any, query: Any, layer: int = layer) -> None:
            queries[layer] = query

        handles.append(attention.to_q.register_forward_hook(remember))
        handles.append(attention.to_out.register_forward_pre_hook(term(layer, site.heads)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def node(module: str, name: str, *arguments: Any) -> Callable[[Any], Any]:
    """A function that applies a node of ComfyUI to a model; skips where this version has none."""

    def patch(model: Any) -> Any:
        try:
            cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        except (ImportError, AttributeError):
            pytest.skip(f"this ComfyUI has no {name}")
        if hasattr(cls, "execute"):
            count = len(inspect.signature(cls.execute).parameters) - 1
            made = cls.execute(model, *arguments[:count])
            return getattr(made, "args", made)[0]
        return cls().patch(model, *arguments)[0]

    return patch


def foreign_attn2(model: Any) -> Any:
    """attn2 patches as other packs make them, but for replacements."""
    patched = model.clone()
    patched.set_model_attn2_patch(lambda n, context, value, options: (n, context * 1.1, value * 0.9))
    patched.set_model_attn2_output_patch(lambda n, options: n * 1.05)
    return patched


def foreign_replacement(model: Any) -> Any:
    """Another pack's attention in place of ComfyUI's, for a whole transformer and for one block."""
    patched = model.clone()

    def replacement(query: Any, key: Any, value: Any, options: Any) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        return optimized_attention(query, key, value, options["n_heads"]) * 0.5

    patched.set_model_attn2_replace(replacement, "input", 4)
    patched.set_model_attn2_replace(replacement, "middle", 0, 0)
    return patched


def attn1_and_blocks(model: Any) -> Any:
    """Patches of self-attention, and between the blocks."""
    patched = model.clone()
    patched.set_model_attn1_patch(lambda n, context, value, options: (n, context * 1.1, value))
    patched.set_model_input_block_patch(lambda h, options: h * 1.02)
    patched.set_model_output_block_patch(lambda h, skip, options: (h * 0.98, skip))
    return patched


def lora(model: Any, scale: float = 0.2) -> Any:
    """Weight patches on the very layers that the adapter acts in."""
    patched = model.clone()
    patched.add_patches(lora_patches(patched), scale)
    return patched


def lora_patches(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(51)
    names = [name for name in model.model.state_dict() if name.endswith(("attn2.to_q.weight", "attn2.to_out.0.weight"))]
    shapes = {name: model.model.state_dict()[name].shape for name in names}
    return {name: ("diff", (torch.randn(shape, generator=generator) * 0.1,)) for name, shape in shapes.items()}


COMPANIONS = {
    "FreeU": node("nodes_freelunch", "FreeU", 1.1, 1.2, 0.9, 0.2),
    "FreeU_V2": node("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "Deep Shrink": node(
        "nodes_model_downscale", "PatchModelAddDownscale", 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    ),
    "Deep Shrink by 1.5": node(
        "nodes_model_downscale", "PatchModelAddDownscale", 3, 1.5, 0.0, 0.5, False, "bilinear", "bicubic"
    ),
    "RescaleCFG": node("nodes_model_advanced", "RescaleCFG", 0.7),
    "NAG": node("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5),
    "attn2 of another pack": foreign_attn2,
    "attn1 and blocks": attn1_and_blocks,
    "LoRA": lora,
}
# They call the model with other conds than the guider's two, or change what a layer makes.
GUIDANCE = {
    "PAG": node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    "SAG": node("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0),
}


def check(pack: Any, world: Any, companion: Callable[[Any], Any], prompt: Any, **options: Any) -> None:
    model = world.model
    want_without = world.sample(companion(model), **options)
    with reference(pack, model, world.adapter, prompt, 0.8):
        want = world.sample(companion(model), **options)
    assert not torch.allclose(want, want_without, atol=0.05)
    for patched in (
        companion(world.apply(model, world.adapter, prompt, weight=0.8)),
        world.apply(companion(model), world.adapter, prompt, weight=0.8),
    ):
        torch.testing.assert_close(world.sample(patched, **options), want, atol=2e-3, rtol=2e-3)


def test_a_replacement_before_ours_stays_and_one_after_ours_is_refused(pack, world):
    model = foreign_replacement(world.model)
    with reference(pack, world.model, world.adapter, world.prompt):
        want = world.sample(model)
    got = world.sample(world.apply(model, world.adapter, world.prompt))
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(want, world.sample(model), atol=0.05)
    with pytest.raises(pack.core.AdapterError, match="Connect its nodes before Apply IP Adapter"):
        world.sample(foreign_replacement(world.apply(world.model, world.adapter, world.prompt)))


def test_layers_that_another_pack_takes_after_ours_are_logged(world, caplog):
    model = world.apply(world.model, world.adapter, world.prompt)
    world.sample(model, steps=1)
    assert not caplog.text
    later = model.clone()
    later.set_model_attn2_replace(lambda query, key, value, options: query, "middle", 0, 0)
    world.sample(later, steps=1)
    assert "<lambda> of another pack took 1 of its 16 layers after it" in caplog.text


def test_the_reference_alone(pack, world):
    check(pack, world, lambda model: model, world.prompt, batch=2)


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_model_node(pack, world, name):
    check(pack, world, COMPANIONS[name], world.prompt, size=(16, 24), batch=2)


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_with_calls_of_its_own(pack, world, name):
    """Which branch each call is, test_branches shows; with the same image in both branches it does not matter here."""
    import dataclasses

    prompt = dataclasses.replace(world.prompt, negative=world.prompt.positive)
    check(pack, world, GUIDANCE[name], prompt, size=(16, 16), batch=2)


@pytest.mark.parametrize("tile", [1, 2])
def test_hypertile(pack, world, tile):
    """It divides the layers at random, seeded by torch's global state."""
    companion = node("nodes_hypertile", "HyperTile", 64 * tile, 2, 1, False)

    def seeded(model):
        torch.manual_seed(1)
        import random

        random.seed(1)
        return companion(model)

    check(pack, world, seeded, world.prompt, size=(32, 32), steps=1)


def test_token_merging_runs(world):
    """ToMe picks its tokens by a random draw of each layer: there is no second image to compare with."""
    companion = node("nodes_tomesd", "TomePatchModel", 0.3)
    patched = world.sample(companion(world.apply(world.model, world.adapter, world.prompt)), steps=1)
    assert torch.isfinite(patched).all() and not torch.equal(patched, world.sample(companion(world.model), steps=1))


def conditionings(world):
    positive, negative = world.conds()
    other, _ = world.conds(seed=8)
    size = {"area": (8, 8, 4, 4), "strength": 0.8}
    mask = torch.zeros(1, 16, 16)
    mask[..., :9] = 1.0
    window = {"start_percent": 0.0, "end_percent": 0.6}
    changes = {"area": size, "mask": {"mask": mask, "mask_strength": 0.7}, "window": window}
    return {
        **{name: [*positive, [other[0][0], {**other[0][1], **change}]] for name, change in changes.items()},
        "longer text": [[torch.cat([positive[0][0]] * 3, dim=1), positive[0][1]]],
    }, negative


@pytest.mark.parametrize("name", ["area", "mask", "window", "longer text"])
def test_conditioning(pack, world, name):
    positive, negative = conditionings(world)
    check(pack, world, lambda model: model, world.prompt, positive=positive[name], negative=negative, batch=2, steps=3)


def test_lora_hooks_of_a_conditioning(pack, world):
    """Weights that change between the two conditionings of one step."""
    import comfy.hooks

    positive, negative = world.conds()
    weights = {}
    for name, (_, (diff,)) in lora_patches(world.model).items():
        weights[f"{name.removesuffix('.weight')}.diff"] = diff
    hooks = comfy.hooks.create_hook_lora(lora=weights, strength_model=0.4, strength_clip=0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    plain = world.sample(world.model, positive=positive, negative=negative)
    assert not torch.allclose(plain, world.sample(world.model, positive=hooked, negative=negative), atol=0.05)
    check(pack, world, lambda model: model, world.prompt, positive=hooked, negative=negative)


def test_control_net(pack, world):
    """A ControlNet has cross-attentions too, and is no part of the prompt's model."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {k: v for k, v in world.model.model.model_config.unet_config.items() if k != "disable_unet_model_creation"}
    config = {**config, "hint_channels": 3, "operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    config.pop("out_channels")
    config.pop("transformer_depth_output", None)
    net = comfy.cldm.cldm.ControlNet(**config)
    world.randomise(net, seed=71)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=torch.float32)
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(72))
    conds = []
    for cond in world.conds():
        added = control.copy().set_cond_hint(hint, 0.6, (0.0, 1.0))
        conds.append([[cond[0][0], {**cond[0][1], "control": added, "control_apply_to_uncond": False}]])
    plain, controlled = world.sample(world.model), world.sample(world.model, positive=conds[0], negative=conds[1])
    assert not torch.allclose(plain, controlled, atol=0.05)
    check(pack, world, lambda model: model, world.prompt, positive=conds[0], negative=conds[1])


@pytest.mark.parametrize("differential", [False, True])
def test_inpainting_with_a_noise_mask(pack, world, differential):
    """What detailers do: a part of the latent is sampled, the rest stays."""
    import comfy.sample

    companion = node("nodes_differential_diffusion", "DifferentialDiffusion", 1.0) if differential else lambda m: m
    mask = torch.linspace(0, 1, 16).expand(1, 16, 16).contiguous()
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    positive, negative = world.conds()

    def run(model):
        return comfy.sample.sample(
            model, noise, 3, 4.0, "euler", "normal", positive, negative, latent, denoise=0.8, noise_mask=mask, seed=5
        )

    with reference(pack, world.model, world.adapter, world.prompt):
        want = run(companion(world.model))
    assert not torch.allclose(want, run(companion(world.model)), atol=0.05)
    for patched in (
        companion(world.apply(world.model, world.adapter, world.prompt)),
        world.apply(companion(world.model), world.adapter, world.prompt),
    ):
        torch.testing.assert_close(run(patched), want, atol=2e-3, rtol=2e-3)


def test_a_model_with_more_channels(pack, world):
    """IC-Light and inpainting models get an image beside the latent, by a wrapper of the UNet's call."""
    model = world.new_model(in_channels=8, seed=13)
    adapter = world.new_adapter(model)
    extra = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(14))

    def light(model):
        patched = model.clone()

        def wrapper(apply_model, arguments):
            rows = len(arguments["input"])
            return apply_model(
                arguments["input"], arguments["timestep"], c_concat=extra.repeat(rows, 1, 1, 1), **arguments["c"]
            )

        patched.set_model_unet_function_wrapper(wrapper)
        return patched

    prompt = world.new_prompt(adapter)
    with reference(pack, model, adapter, prompt):
        want = world.sample(light(model))
    assert not torch.allclose(want, world.sample(light(model)), atol=0.05)
    for patched in (light(world.apply(model, adapter, prompt)), world.apply(light(model), adapter, prompt)):
        torch.testing.assert_close(world.sample(patched), want, atol=2e-3, rtol=2e-3)


def test_a_model_of_fp8(pack, world, monkeypatch):
    import comfy.supported_models

    original = comfy.supported_models.SD15.set_inference_dtype
    eight_bits = (torch.float8_e4m3fn, torch.float32)
    monkeypatch.setattr(
        comfy.supported_models.SD15, "set_inference_dtype", lambda self, *_: original(self, *eight_bits)
    )
    model = world.new_model(seed=15)
    assert model.model_dtype() is torch.float8_e4m3fn
    with reference(pack, model, world.adapter, world.prompt):
        want = world.sample(model)
    patched = world.apply(model, world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(patched), want, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(want, world.sample(model), atol=0.05)
