"""The same weights, latents and images through ComfyUI and through diffusers give the same result."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture(scope="module")
def both(pack, world, tmp_path_factory):
    """A tiny diffusers UNet in SD1.5's layout, and ComfyUI's model with its weights."""
    folder = tmp_path_factory.mktemp("unet")
    with torch.inference_mode():
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=32,
        ).eval()
        world.randomise(unet, seed=41)
        unet.save_pretrained(str(folder))
        return unet, pack.demo_model.load_unet(folder)


def capture(model):
    """What goes into and comes out of the diffusion model."""
    calls = []

    def hook(module, args, kwargs, output):
        calls.append((*args, kwargs["context"], output))

    return calls, model.model.diffusion_model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight_type", ["linear", "style transfer"])
def test_equality(pack, world, both, weight_type, masked):
    unet, model = both
    core = pack.core
    adapter = world.new_adapter(model, seed=42)
    prompt = world.new_prompt(adapter, seed=43)
    mask = (torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(44)) > 0.4).float() if masked else None
    patched = world.apply(model, adapter, prompt, weight=0.8, weight_type=weight_type, attn_mask=mask)
    calls, hook = capture(patched)
    try:
        world.sample(patched, steps=2)
    finally:
        hook.remove()
    sites = core.diffusers_sites(unet)
    weights = [w.weight for w in core.layer_weights(weight_type, core.weight_layout(sites), 0.8)]
    tokens = world.tokens(adapter, prompt)
    pairs = adapter.adapter.keys_values(torch.cat([tokens.negative, tokens.positive]))
    for latents, timestep, context, output in calls:
        application = core.AdapterApplication(
            key_values=pairs,
            weight=[weights[site.transformer_index] for site in sites],
            mask=mask,
            rows=[0, 1],
        )
        with core.inject(unet, [application]):
            want = unet(latents, timestep, context).sample
        torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)


def test_the_layers_are_not_all_alike(world, both):
    """The equality above would hold for any layer order if all layers were alike."""
    _, model = both
    adapter = world.new_adapter(model, seed=42)
    weights = [pair[0].weight for pair in adapter.adapter.layers.pairs()]
    pairs = itertools.pairwise(weights)
    assert not any(torch.equal(a, b) for a, b in pairs if a.shape == b.shape)


def test_the_config_is_diffusers_own(both, tmp_path):
    unet, _ = both
    unet.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["attention_head_dim"] == 2


def test_equality_with_diffusers_own_adapter(world, both):
    """No code of ours on the other side: diffusers loads the published layout, projects and attends itself."""
    unet, model = both
    adapter = world.new_adapter(model, seed=42)
    patched = world.apply(model, adapter, world.new_prompt(adapter, seed=43), weight=0.8)
    calls, hook = capture(patched)
    try:
        world.sample(patched, steps=3)
    finally:
        hook.remove()
    features = torch.randn(1, 48, generator=torch.Generator().manual_seed(43))  # as new_prompt draws them
    image_embeds = torch.cat([torch.zeros_like(features), features]).unsqueeze(1)  # negative first, as the chunks
    state = {
        "image_proj": dict(adapter.adapter.projector.state_dict()),
        "ip_adapter": dict(adapter.adapter.layers.state_dict()),
    }
    own = diffusers.UNet2DConditionModel.from_config(unet.config).eval()
    own.load_state_dict(unet.state_dict())
    own._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    for processor in own.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.8]
    assert len(calls) == 3
    for latents, timestep, context, output in calls:
        want = own(latents, timestep, context, added_cond_kwargs={"image_embeds": [image_embeds]}).sample
        torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)
        without = unet(latents, timestep, context).sample
        assert (want - without).abs().max() > 1e-2
