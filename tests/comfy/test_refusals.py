"""Wrong pairings are refused before sampling, by a message that names both sides and what to do."""

from __future__ import annotations

import pytest
import torch


def refuse(pack, call, *words):
    with pytest.raises(pack.core.AdapterError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_diffusion_transformer(pack, world):
    class Flux(torch.nn.Module):
        pass

    model = world.model.clone()
    model.add_object_patch("diffusion_model", Flux())
    refuse(pack, lambda: world.apply(model, world.adapter, world.prompt), "Flux is not a UNet", "SD1.5, SD2 and SDXL")


def test_a_real_diffusion_transformer(pack, world):
    """ComfyUI's own MMDiT (SD3)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = world.model.clone()
    mmdit = OpenAISignatureMMDITWrapper(
        input_size=None,
        depth=1,
        pos_embed_max_size=8,
        num_patches=64,
        adm_in_channels=16,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    model.add_object_patch("diffusion_model", mmdit)
    refuse(pack, lambda: world.apply(model, world.adapter, world.prompt), "is not a UNet")


@pytest.fixture(scope="module")
def video(world):
    """ComfyUI's own Stable Video Diffusion, narrow."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    inner = world.model.model.model_config.unet_config
    shape = {
        "in_channels": 8,
        "use_temporal_attention": True,
        "use_temporal_resblock": True,
        "extra_ff_mix_layer": True,
        "merge_strategy": "learned_with_images",
        "video_kernel_size": [3, 1, 1],
        "use_spatial_context": True,
        "use_linear_in_transformer": True,
        "adm_in_channels": 768,
        "num_classes": "sequential",
    }
    config = comfy.supported_models.SVD_img2vid({**inner, **shape})
    config.set_inference_dtype(torch.float32, None)
    home = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(comfy.model_base.SVD_img2vid(config, device=home), home, home)


def test_a_video_model(pack, world, encoder, video):
    """Its layers over time would take our keys and values for those over the image."""
    image, mask = torch.rand(1, 40, 40, 3), torch.ones(1, 8, 8)
    old = {cls.__name__: cls for cls in pack.register.OLD_NODES}
    adapter = pack.wires.AdapterFile(world.adapter)
    given = {"model": video, "ipadapter": adapter, "clip_vision": encoder, "image": image}
    tiled = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0, "sharpening": 0.0}
    for call in (
        lambda: world.apply(video, world.adapter, world.prompt),
        lambda: pack.ImagePrompt.execute(video, image),
        lambda: pack.ImagePromptRegions.execute(
            video, world.adapter, world.conds()[0], mask_1=mask, image_prompt_1=world.prompt
        ),
        lambda: pack.RecordAttentionMap.execute(video),
        lambda: old["IPAdapterUnifiedLoader"].load_models(video, "STANDARD (medium strength)"),
        lambda: old["IPAdapterAdvanced"].apply_ipadapter(**given),
        lambda: old["IPAdapterTiled"].apply_tiled(**given, **tiled),
    ):
        refuse(pack, call, "is a video model (Stable Video Diffusion)", "SD1.5, SD2 and SDXL", "AnimateDiff")


def test_another_family(pack, world):
    sdxl = world.new_model("sdxl")
    refuse(
        pack,
        lambda: world.apply(sdxl, world.adapter, world.prompt),
        "a.safetensors is made for",
        "16 layers",
        "the connected model is",
        "70 layers",
    )


def test_published_families_by_name(pack, world):
    """The widths of the published models decide, not the tiny ones of these tests."""
    core = pack.core
    context, widths = core.FAMILIES["sdxl"]
    sdxl = core.new_spec("base", widths, context)
    sites = [core.Site(2 * i + 1, str(i), w, 768, i) for i, w in enumerate(core.FAMILIES["sd15"][1])]
    refuse(
        pack,
        lambda: core.check_compatible(sdxl, sites, "ip-adapter_sdxl_vit-h.safetensors"),
        "ip-adapter_sdxl_vit-h.safetensors is made for SDXL (context 2048",
        "SD1.5 (768",
        "Use an SD1.5 adapter",
    )


def test_another_width(pack, world):
    wide = world.new_model(width=64)
    refuse(pack, lambda: world.apply(wide, world.adapter, world.prompt), "its layer 1 is 32 wide", "model's 64")


def test_a_prompt_of_another_adapter(pack, world):
    other = world.new_adapter(world.model, seed=9, name="b")
    refuse(
        pack,
        lambda: world.apply(world.model, other, world.prompt),
        "a.safetensors",
        "b.safetensors",
        "Connect the same Load IP Adapter",
    )


def test_another_encoder(pack, world):
    class Encoder:
        image_size = 32
        image_mean = (0.5, 0.5, 0.5)

        def encode_image(self, image, crop=True):
            return {
                "image_embeds": torch.zeros(len(image), 17),
                "penultimate_hidden_states": torch.zeros(len(image), 5, 19),
            }

    refuse(
        pack,
        lambda: pack.EncodeImagePrompt.execute(world.adapter, Encoder(), torch.zeros(1, 40, 40, 3)),
        "image_embeds of 17",
        "a.safetensors takes image_embeds of 48",
        "models/clip_vision",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [("false", "one_each is 'false'. Connect true or false."), (2.5, "one_each is '2.5'. Connect true or false.")],
)
def test_a_wire_of_another_type_into_a_switch(pack, world, encoder, value, message):
    image = torch.rand(1, 40, 40, 3)
    refuse(pack, lambda: pack.EncodeImagePrompt.execute(world.adapter, encoder, image, one_each=value), message)


def test_a_wire_of_another_type_into_a_text(pack, world):
    refuse(pack, lambda: pack.SaveImagePrompt.execute(world.prompt, 3), "filename_prefix is 3. Connect a text.")
    refuse(pack, lambda: pack.LayerWeights.execute("SDXL", layers=5), "layers is 5. Connect a text.")
