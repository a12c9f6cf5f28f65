"""UNets that were pruned, which `ipadapter train` accepts too: ComfyUI's own models against diffusers' own adapter."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 128),
    "mid_block_type": "UNetMidBlock2D",
    "use_linear_projection": True,
}
SD15 = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1}
# As published, but narrow: (diffusers' config, ComfyUI's config, transformers before, in and after the middle block).
LAYOUTS = {
    "SSD-1B": (
        {
            **SDXL,
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]},
        (4, 0, 6),
    ),
    "Vega": (
        {
            **SDXL,
            "transformer_layers_per_block": [1, 1, 2],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        },
        {"transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]},
        (4, 0, 6),
    ),
    "BK-SDM base": (SD15, {"transformer_depth_middle": 1}, (3, 1, 6)),
    "BK-SDM small": ({**SD15, "mid_block_type": None}, {"transformer_depth_middle": -2}, (3, 0, 6)),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pruned(request, world):
    """A diffusers UNet, ComfyUI's model with its weights, and its numbers of transformers."""
    import comfy.utils

    config, shape, counts = LAYOUTS[request.param]
    with torch.inference_mode():
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=64, attention_head_dim=2, **config).eval()
        world.randomise(unet, seed=71)
        shape = {"transformer_depth": [1, 1, 1, 0], "transformer_depth_output": [1] * 6 + [0] * 2, **shape}
        if "SDM" in request.param:
            shape = {"channel_mult": [1, 2, 4, 4], "num_res_blocks": [1] * 4, **shape}
        else:
            shape = {"channel_mult": [1, 2, 4], "num_res_blocks": [2] * 3, **shape, "transformer_depth_middle": -1}
            shape["use_linear_in_transformer"] = True
        model = world.new_model(**shape)
        inner = model.model.diffusion_model
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        inner.load_state_dict({names[name]: tensor for name, tensor in unet.state_dict().items()}, strict=True)
    return unet, model, counts


@pytest.mark.parametrize("weight_type", ["linear", "ease out", "weak output"])
def test_equality_with_diffusers_own_adapter(world, pruned, weight_type):
    unet, model, (before, middle, after) = pruned
    adapter = world.new_adapter(model, seed=72)
    patched = world.apply(model, adapter, world.new_prompt(adapter, seed=73), weight=0.8, weight_type=weight_type)
    calls = []
    inner = patched.model.diffusion_model
    hook = inner.register_forward_hook(lambda m, a, k, out: calls.append((*a, k["context"], out)), with_kwargs=True)
    try:
        world.sample(patched, steps=1)
    finally:
        hook.remove()
    features = torch.randn(1, 48, generator=torch.Generator().manual_seed(73))  # as new_prompt draws them
    image_embeds = torch.cat([torch.zeros_like(features), features]).unsqueeze(1)  # negative first, as the chunks
    own = diffusers.UNet2DConditionModel.from_config(unet.config).eval()
    own.load_state_dict(unet.state_dict())
    state = {
        "image_proj": dict(adapter.adapter.projector.state_dict()),
        "ip_adapter": dict(adapter.adapter.layers.state_dict()),
    }
    own._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    count = before + middle + after
    weights = {
        "linear": [0.8] * count,
        "ease out": [0.8 * (0.05 + 0.95 * index / count) for index in range(count)],
        "weak output": [0.8] * (before + middle) + [0.16] * after,
    }[weight_type]
    stages = ("down_blocks", "mid_block", "up_blocks")  # in the order in which they run
    attentions = [name for name in own.attn_processors if ".attn2" in name]
    transformers = list(dict.fromkeys(name.split(".transformer_blocks")[0] for name in attentions))
    transformers.sort(key=lambda name: [stages.index(part) if part in stages else part for part in name.split(".")])
    assert len(transformers) == count
    for name in attentions:
        own.attn_processors[name].scale = [weights[transformers.index(name.split(".transformer_blocks")[0])]]
    assert calls
    for latents, timestep, context, output in calls:
        want = own(latents, timestep, context, added_cond_kwargs={"image_embeds": [image_embeds]}).sample
        torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)
        assert (want - unet(latents, timestep, context).sample).abs().max() > 1e-3


def test_what_needs_other_layers_is_refused(pack, world, pruned):
    _, model, (before, middle, after) = pruned
    adapter = world.new_adapter(model, seed=72)
    prompt = world.new_prompt(adapter)
    refused = []
    for weight_type in pack.core.WEIGHT_TYPES:
        try:
            world.apply(model, adapter, prompt, weight_type=weight_type)
        except pack.core.AdapterError as error:
            assert f"this one has {before}, {middle} and {after}" in str(error) and "Use 'linear'" in str(error)
            refused.append(weight_type)
    tables = [name for name in pack.core.WEIGHT_TYPES if "style" in name or "composition" in name]
    assert len(tables) == 7
    assert refused == ([] if middle else ["weak middle", "strong middle"]) + tables
