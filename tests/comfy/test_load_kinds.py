"""Load IP Adapter: face adapters, every image encoder that ComfyUI loads, other resolutions, and empty folders."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file


def write_adapter(pack, folder, name, kind, **options):
    """A random adapter file of this kind for a narrow UNet."""
    options = {"image_dim": 48, "face_dim": 32, "lora_rank": 2, "dim_head": 16, "depth": 1, **options}
    spec = pack.core.new_spec(kind, [32, 64], 64, **options)
    pack.core.save_adapter(folder / name, pack.core.IPAdapter(spec))
    return spec


@pytest.mark.parametrize("kind", ["faceid", "portrait"])
def test_an_adapter_that_sees_faces_alone_needs_no_encoder(pack, folders, kind, caplog):
    write_adapter(pack, folders["ipadapter"], "f.safetensors", kind)
    adapter, encoder = pack.LoadIPAdapter.execute("f.safetensors").args
    assert encoder is None and adapter.spec.kind == kind and not caplog.records
    save_file({"x": torch.ones(2)}, folders["clip_vision"] / "e.safetensors")
    assert pack.LoadIPAdapter.execute("f.safetensors", "e.safetensors").args[1] is None
    assert "takes no image encoder: clip_vision_name" in caplog.text


# name of the file, metadata, faceid_plus -> v2, or the words of the refusal
VERSIONS = [
    ("a-plusv2.safetensors", None, "from the file", True),
    ("ip-adapter-faceid-plus.safetensors", None, "from the file", False),
    ("mine.safetensors", True, "from the file", True),
    ("faceid-plusv2.safetensors", False, "from the file", False),
    ("a-plusv2.safetensors", None, "v1", False),
    ("mine.safetensors", None, "v2", True),
    ("mine.safetensors", None, "from the file", "mine.safetensors is a FaceID-Plus .* Set faceid_plus"),
]


@pytest.mark.parametrize(("name", "metadata", "choice", "expected"), VERSIONS)
def test_faceid_plus_versions(pack, folders, narrow, sound_state, caplog, name, metadata, choice, expected):
    save_file(sound_state, folders["clip_vision"] / "e.safetensors")
    write_adapter(pack, folders["ipadapter"], name, "faceid-plus", shortcut=metadata)
    if isinstance(expected, str):
        with pytest.raises(pack.core.AdapterError, match=expected):
            pack.LoadIPAdapter.execute(name, faceid_plus=choice)
        return
    output = pack.LoadIPAdapter.execute(name, faceid_plus=choice)
    adapter, encoder = output.args
    assert adapter.adapter.projector.shortcut is expected and adapter.spec.shortcut is expected
    assert ("v2 (shortcut)" if expected else "v1") in output.ui.as_dict()["text"][0]
    assert encoder.image_size == 32
    by_name = metadata is None and choice == "from the file"
    assert ("as its name suggests" in caplog.text) is by_name


def test_a_version_for_an_adapter_without_versions(pack, folders):
    write_adapter(pack, folders["ipadapter"], "p.safetensors", "portrait")
    with pytest.raises(pack.core.AdapterError, match=r"faceid_plus is v2, and p\.safetensors is a portrait"):
        pack.LoadIPAdapter.execute("p.safetensors", faceid_plus="v2")


def test_empty_folders_say_where_files_go_and_which(pack, folders):
    inputs = {item.id: item for item in pack.LoadIPAdapter.define_schema().inputs}
    adapters, encoders = inputs["ipadapter_name"].options, inputs["clip_vision_name"].options
    assert len(adapters) == 1 and "models/ipadapter" in adapters[0]
    assert encoders[0] == "auto" and len(encoders) == 2 and "models/clip_vision" in encoders[1]
    with pytest.raises(pack.core.AdapterError) as error:
        pack.LoadIPAdapter.execute(adapters[0])
    for words in (str(folders["ipadapter"]), "ip-adapter-plus_sd15.safetensors", "huggingface.co/h94/IP-Adapter"):
        assert words in str(error.value)
    assert pack.LoadIPAdapter.fingerprint_inputs(adapters[0])
    write_adapter(pack, folders["ipadapter"], "p.safetensors", "base", image_dim=1024)
    import folder_paths

    folder_paths.filename_list_cache.clear()
    assert {item.id: item for item in pack.LoadIPAdapter.define_schema().inputs}["ipadapter_name"].options == [
        "p.safetensors"
    ]
    for name in encoders:
        with pytest.raises(pack.core.AdapterError) as error:
            pack.LoadIPAdapter.execute("p.safetensors", name)
        assert str(folders["clip_vision"]) in str(error.value) and "huggingface.co" in str(error.value)


def test_another_resolution_equals_transformers(pack, folders, narrow, sound_state, vision):
    """As 448 pixels for an encoder of 224, here 64 for one of 32: the position embeddings are interpolated."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = {key: tensor * 0.1 if tensor.is_floating_point() else tensor for key, tensor in sound_state.items()}
    save_file(state, folders["clip_vision"] / "e.safetensors")
    write_adapter(pack, folders["ipadapter"], "b.safetensors", "base")
    encoder = pack.LoadIPAdapter.execute("b.safetensors", encoder_resolution=64).args[1]
    assert encoder.image_size == 64
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**vision, "num_hidden_layers": 32})).eval()
    theirs.load_state_dict(state, strict=False)
    image = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(5))
    ours = encoder.encode_image(image, crop=False)
    import comfy.clip_vision

    pixels = comfy.clip_vision.clip_preprocess(image, size=64, crop=False).float()
    want = theirs(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    assert ours["penultimate_hidden_states"].shape == (2, 17, 48)
    torch.testing.assert_close(ours["image_embeds"], want.image_embeds, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours["penultimate_hidden_states"], want.hidden_states[-2], atol=1e-3, rtol=1e-3)
    with pytest.raises(pack.core.AdapterError, match=r"patches of 16 pixels, and encoder_resolution 100 .* Use 96"):
        pack.LoadIPAdapter.execute("b.safetensors", encoder_resolution=100)


def test_the_resolution_of_the_adapters_file(pack, folders, narrow, sound_state):
    save_file(sound_state, folders["clip_vision"] / "e.safetensors")
    spec = pack.core.new_spec("base", [32, 64], 64, image_dim=48)
    adapter = pack.core.IPAdapter(spec)
    pack.core.save_adapter(folders["ipadapter"] / "b.safetensors", adapter, {pack.core.METADATA_RESOLUTION: "64"})
    sizes = [
        pack.LoadIPAdapter.execute("b.safetensors", encoder_resolution=pixels).args[1].image_size for pixels in (0, 32)
    ]
    assert sizes == [64, 32]


SMALL = {"hidden_size": 48, "num_attention_heads": 2, "num_channels": 3, "intermediate_size": 64}
SIGLIP = {**SMALL, "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 27, "image_size": 32, "patch_size": 16}
DINO2 = {**SMALL, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "num_hidden_layers": 24, "image_size": 518}
DINO3 = {**SMALL, "layer_norm_eps": 1e-5, "num_hidden_layers": 24, "patch_size": 16, "image_size": 224}
# model_type: ComfyUI's config, made narrow; tokens at its own size; another size, and its tokens
FAMILIES = {
    "siglip_vision_model": ({**SIGLIP}, 4, 64, 16),
    "siglip2_vision_model": ({**SIGLIP, "image_size": -1, "num_patches": 16}, 16, 128, 64),
    "dinov2": ({**DINO2, "patch_size": 14}, 1370, 224, 257),
    "dinov3": ({**DINO3, "num_register_tokens": 4, "rope_theta": 100.0}, 201, 448, 789),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_comfyui_loads_beside_clip(pack, world, folders, monkeypatch, model_type):
    import comfy.clip_vision
    import comfy.ops

    config, tokens, size, resized = FAMILIES[model_type]
    config = {**config, "model_type": model_type}
    model_class = comfy.clip_vision.IMAGE_ENCODERS.get(model_type)
    if model_class is None:
        pytest.skip(f"this ComfyUI does not know {model_type}")
    made = model_class(config, torch.float32, "cpu", comfy.ops.manual_cast)
    world.randomise(made, seed=7)
    state = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    if model_type.startswith("dino"):
        state["embeddings.mask_token"].zero_()  # as published
    save_file(state, folders["clip_vision"] / "e.safetensors")
    path = folders["clip_vision"] / "e.safetensors"
    shape = pack.encoders.read_encoder(path)
    assert shape is not None and shape.family.lower() == model_type.removesuffix("_vision_model")
    original = comfy.clip_vision.ClipVisionModel
    narrow_config = folders["clip_vision"].parent / "config.json"
    narrow_config.write_text(json.dumps(config))
    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", lambda _: original(str(narrow_config)))
    own = comfy.clip_vision.load(str(path))  # as ComfyUI's Load CLIP Vision does
    if model_type in ("siglip2_vision_model", "dinov3"):
        with pytest.raises(pack.core.AdapterError, match=r"The encoder \(.*\) needs Load IP Adapter"):
            pack.checks.check_encoder(own, "The encoder")
    else:
        pack.checks.check_encoder(own, "The encoder")
    write_adapter(pack, folders["ipadapter"], "p.safetensors", "plus")
    image = torch.rand(1, 40, 40, 3)
    for pixels, expected in ((0, tokens), (size, resized)):
        encoder = pack.LoadIPAdapter.execute("p.safetensors", "e.safetensors", encoder_resolution=pixels).args[1]
        seen = pack.image_prompt.crop_image(image, encoder.image_size, "center")
        states = encoder.encode_image(seen, crop=False)["penultimate_hidden_states"]
        assert states.shape == (1, expected, 48)
        assert torch.isfinite(states).all() and states.std() > 0


def test_kolors_is_not_sdxl(pack, world):
    """ComfyUI's own SDXL UNet with the label width of Kolors, and with the projection that other packs put on it."""
    shape = {"context_dim": 2048, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1}
    shape["transformer_depth_output"] = [0, 0, 0, 1, 1, 1, 1, 1, 1]
    sdxl = world.new_model("sdxl", **shape)
    labelled = world.new_model("sdxl", adm_in_channels=5632, **shape)
    projected = world.new_model("sdxl", **shape)
    projected.model.diffusion_model.encoder_hid_proj = torch.nn.Linear(4096, 2048)
    sites = pack.core.cross_attention_sites(sdxl.model.diffusion_model)
    widths = [site.dim for site in sites]
    kolors = pack.core.new_spec("plus", widths, 2048, image_dim=1024, resampler_dim=2048, depth=1)
    base = pack.core.new_spec("base", widths, 2048)
    assert kolors.is_kolors and not base.is_kolors
    for spec, fits, not_fits in ((kolors, [labelled, projected], [sdxl]), (base, [sdxl], [labelled, projected])):
        with torch.device("meta"):
            adapter = pack.types.manage("x", pack.core.IPAdapter(spec))
        prompt = object()
        for model in fits:
            unet = model.model.diffusion_model
            pack.core.check_compatible(spec, pack.core.cross_attention_sites(unet), "x", unet=unet)
        for model in not_fits:
            with pytest.raises(pack.core.AdapterError, match="Kolors"):
                pack.ApplyIPAdapter.execute(model, adapter, prompt)


def test_an_encoder_is_in_memory_once(pack, world, folders, sound_state, narrow):
    """For two adapters, and for two nodes; another size or another file is another encoder."""
    for name in ("a", "b"):
        adapter = world.new_adapter(world.model, kind="plus", seed=ord(name)).adapter
        pack.core.save_adapter(folders["ipadapter"] / f"{name}.safetensors", adapter)
    file = folders["clip_vision"] / "encoder.safetensors"
    save_file({key: value * 0.1 if value.is_floating_point() else value for key, value in sound_state.items()}, file)
    first, second = (pack.LoadIPAdapter.execute(f"{name}.safetensors").args[1] for name in ("a", "b"))
    assert first is second
    larger = pack.LoadIPAdapter.execute("a.safetensors", encoder_resolution=2 * first.image_size).args[1]
    assert larger is not first and larger.image_size == 2 * first.image_size
    stamp = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(stamp, stamp))
    assert pack.LoadIPAdapter.execute("a.safetensors").args[1] is not first
