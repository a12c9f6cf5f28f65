"""The old loaders: the same files as the old pack, others of the same shapes where the names differ, and its wires."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

H14 = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
BIGG = "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"
PRESETS = {
    "STANDARD (medium strength)": ("base", {"sd15": "ip-adapter_sd15", "sdxl": "ip-adapter_sdxl_vit-h"}),
    "LIGHT - SD1.5 only (low strength)": ("base", {"sd15": "ip-adapter_sd15_light_v11"}),
    "VIT-G (medium strength)": ("base", {"sd15": "ip-adapter_sd15_vit-G", "sdxl": "ip-adapter_sdxl"}),
    "PLUS (high strength)": ("plus", {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"}),
    "PLUS FACE (portraits)": ("plus", {"sd15": "ip-adapter-plus-face_sd15", "sdxl": "ip-adapter-plus-face_sdxl_vit-h"}),
    "FULL FACE - SD1.5 only (portraits stronger)": ("full", {"sd15": "ip-adapter-full-face_sd15"}),
    "Composition": ("plus", {"sd15": "ip_plus_composition_sd15", "sdxl": "ip_plus_composition_sdxl"}),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_finds_the_file_that_the_old_pack_finds(
    peer, old, models, put, folders, write_encoder, vision, preset
):
    import sys

    kind, names = PRESETS[preset]
    for name in (H14, BIGG):
        write_encoder(name)
    utils = sys.modules["the_old_pack.utils"]
    loader = "IPAdapterUnifiedLoaderCommunity" if preset == "Composition" else "IPAdapterUnifiedLoader"
    for family, name in names.items():
        if (family, kind) == ("sdxl", "plus"):
            continue  # large: the names are looked at below
        put(family, kind, name)
        expected, *_ = utils.get_ipadapter_file(preset, family == "sdxl")
        model, pipeline = old[loader]().load_models(models[family], preset)
        assert model is models[family]
        assert pipeline["ipadapter"]["file"] == expected
        assert pipeline["clipvision"]["file"] == utils.get_clipvision_file(preset)
        assert pipeline["clipvision"]["model"].model is vision.model
        assert pipeline["insightface"] == {"provider": None, "model": None}


def test_what_a_file_says_of_its_version_wins_over_its_name(old, pack, put, folders):
    from safetensors import safe_open
    from safetensors.torch import save_file

    put("sd15", "faceid-plus", "a")
    with safe_open(folders / "ipadapter" / "a.safetensors", "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    for version in (False, True):
        name = f"{version}-plusv2.safetensors"
        changed = {**metadata, pack.core.METADATA_SHORTCUT: str(version).lower()}
        save_file(tensors, folders / "ipadapter" / name, changed)
        (loaded,) = old["IPAdapterModelLoader"]().load_ipadapter_model(name)
        assert pack.wires.loaded_adapter(loaded).adapter.projector.shortcut is version


def test_names_of_all_presets(peer, pack, folders):
    """By name alone, for every file that the old pack can find."""
    import sys

    import folder_paths

    utils = sys.modules["the_old_pack.utils"]
    published = [name for _, names in PRESETS.values() for name in names.values()]
    published += ["ip-adapter-faceid_sd15", "ip-adapter-faceid_sdxl", "ip-adapter-faceid-plus_sd15"]
    published += ["ip-adapter-faceid-plusv2_sd15", "ip-adapter-faceid-plusv2_sdxl", "ip_adapter_plus_general"]
    published += ["ip-adapter-faceid-portrait-v11_sd15", "ip-adapter-faceid-portrait_sd15"]
    published += ["ip-adapter-faceid-portrait_sdxl", "ip-adapter-faceid-portrait_sdxl_unnorm"]
    for name in published:
        (folders / "ipadapter" / f"{name}.safetensors").write_bytes(b"")
        (folders / "loras" / f"{name}_lora.safetensors").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    presets = [*PRESETS, "FACEID", "FACEID PLUS - SD1.5 only", "FACEID PLUS V2", "FACEID PORTRAIT (style transfer)"]
    presets += ["FACEID PORTRAIT UNNORM - SDXL only (strong)", "Kolors"]
    found = 0
    for preset in presets:
        for family in ("sd15", "sdxl"):
            try:
                path, faces, lora = utils.get_ipadapter_file(preset, family == "sdxl")
            except Exception:
                with pytest.raises(pack.core.AdapterError):
                    pack.presets.find_adapter(preset, pack.presets.find_preset(preset), family)
                continue
            wanted = pack.presets.find_preset(preset)
            assert pack.presets.find_adapter(preset, wanted, family) == path
            assert wanted.faces == faces
            assert pack.presets.find_lora(wanted, family) == (utils.get_lora_file(lora) if lora else None)
            found += 1
    assert found == 21


def test_other_names_are_found_by_their_tensors(old, models, put, folders, write_encoder):
    put("sd15", "plus", "my favourite")
    write_encoder("some encoder.safetensors")
    _, pipeline = old["IPAdapterUnifiedLoader"]().load_models(models["sd15"], "PLUS (high strength)")
    assert Path(pipeline["ipadapter"]["file"]).name == "my favourite.safetensors"
    assert Path(pipeline["clipvision"]["file"]).name == "some encoder.safetensors"


def test_what_is_missing_is_named(pack, old, models, put, folders, write_encoder):
    load = old["IPAdapterUnifiedLoader"]().load_models
    with pytest.raises(pack.core.AdapterError, match=r"No adapter for preset 'PLUS FACE.*h94/IP-Adapter"):
        load(models["sd15"], "PLUS FACE (portraits)")
    put("sd15", "plus", "composition")
    with pytest.raises(pack.core.AdapterError, match="It holds composition"):
        load(models["sd15"], "PLUS (high strength)")
    with pytest.raises(pack.core.AdapterError, match=r"is for SD1\.5 models"):
        load(models["sdxl"], "FULL FACE - SD1.5 only (portraits stronger)")
    put("sd15", "plus", "ip-adapter-plus_sd15")
    with pytest.raises(pack.core.AdapterError, match="No image encoder for ip-adapter-plus_sd15"):
        load(models["sd15"], "PLUS (high strength)")


def test_a_file_is_read_once_while_it_is_held_and_let_go_after(old, adapter_file):
    file = adapter_file("sd15")
    (first,) = old["IPAdapterModelLoader"]().load_ipadapter_model(file)
    (again,) = old["IPAdapterModelLoader"]().load_ipadapter_model(ipadapter_file=file)
    assert again is first
    held = weakref.ref(first)
    del first, again
    gc.collect()
    assert held() is None


def test_the_wire_reads_as_the_old_packs(peer, old, adapter_file):
    """Other packs look into it: the same keys, names, shapes and values."""
    for file in (adapter_file("sd15", "plus"), adapter_file("sd15", "base")):
        theirs, ours = (nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)[0] for nodes in (peer.nodes, old))
        assert set(ours) == set(theirs) == {"image_proj", "ip_adapter"}
        assert "ipadapter" not in ours and "faceidplusv2" not in ours
        for part in theirs:
            assert set(ours[part]) == set(theirs[part])
            assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])


def test_an_adapter_that_another_pack_loaded(peer, old, models, vision, adapter_file, run):
    """The old pack's dict on our nodes: built once, kept on it, never copied with the model."""
    file = adapter_file("sd15", "base")
    (theirs,) = peer.nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)
    (ours,) = old["IPAdapterModelLoader"]().load_ipadapter_model(file)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    latents = []
    for adapter in (theirs, ours, theirs):
        model, _ = old["IPAdapterAdvanced"]().apply_ipadapter(models["sd15"], adapter, image=image, clip_vision=vision)
        latents.append(run(model, "sd15"))
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2])
    loaded = theirs["ip_adapter_kit"]
    layer = next(iter(theirs["ip_adapter"].values()))
    assert any(layer.data_ptr() == weight.data_ptr() for weight in loaded.adapter.layers.state_dict().values())


def test_presence_is_told_by_files(pack, peer_folder, tmp_path):
    find = pack.presence.find_old_pack
    assert find([tmp_path, tmp_path / "missing"]) is None
    ours = tmp_path / "ComfyUI_IPAdapter_plus"  # the name means nothing
    ours.mkdir()
    (ours / "__init__.py").write_text("")
    assert find([tmp_path]) is None
    disabled = tmp_path / "x.disabled"
    disabled.symlink_to(peer_folder)
    assert find([tmp_path]) is None
    (tmp_path / "any name").symlink_to(peer_folder)
    assert find([tmp_path]) == tmp_path / "any name"


def test_what_the_command_line_leaves_out_is_absent(pack, peer_folder, tmp_path, monkeypatch):
    """As with --disable-all-custom-nodes, and --whitelist-custom-nodes beside it."""
    import comfy.cli_args

    find = pack.presence.find_old_pack
    (tmp_path / "any name").symlink_to(peer_folder)
    monkeypatch.setattr(comfy.cli_args.args, "whitelist_custom_nodes", ["ip-adapter-kit"])
    assert find([tmp_path]) == tmp_path / "any name", "a whitelist alone leaves nothing out"
    monkeypatch.setattr(comfy.cli_args.args, "disable_all_custom_nodes", True)
    assert find([tmp_path]) is None
    monkeypatch.setattr(comfy.cli_args.args, "whitelist_custom_nodes", ["ip-adapter-kit", "any name"])
    assert find([tmp_path]) == tmp_path / "any name"
    (tmp_path / "any name").rename(tmp_path / "any name.disabled")
    monkeypatch.setattr(comfy.cli_args.args, "whitelist_custom_nodes", ["any name.disabled"])
    assert find([tmp_path]) is None, "ComfyUI skips it first"


def test_where_the_old_pack_lies_its_ids_stay_its_own(pack, peer_folder, tmp_path, monkeypatch, caplog):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    assert len(pack.register.old_nodes()) == 37
    (tmp_path / "any name").symlink_to(peer_folder)
    with caplog.at_level("INFO"):
        assert pack.register.old_nodes() == []
    assert [record for record in caplog.records if "brings the old IPAdapter nodes" in record.message]


def replaced(file):
    """Another version of a file, which its time and size tell."""
    file.write_bytes(file.read_bytes() + b" ")


def test_a_replaced_file_is_loaded_again(old, put, folders, write_encoder):
    """By every loader: ComfyUI keeps what a node gave as long as its fingerprint stays."""
    import folder_paths

    put("sd15", "plus", "plus")
    write_encoder("encoder.safetensors")
    for name in ("ip-adapter-faceid_sd15_lora", "another"):
        (folders / "loras" / f"{name}.safetensors").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    adapter, encoder = folders / "ipadapter" / "plus.safetensors", folders / "clip_vision" / "encoder.safetensors"
    lora, another = (
        folders / "loras" / "ip-adapter-faceid_sd15_lora.safetensors",
        folders / "loras" / "another.safetensors",
    )
    loaders = {
        "IPAdapterUnifiedLoader": "PLUS (high strength)",
        "IPAdapterUnifiedLoaderFaceID": "FACEID",
        "IPAdapterUnifiedLoaderCommunity": "Composition",
    }
    for name, preset in loaders.items():
        look = old[name].fingerprint_inputs
        seen = [look(preset=preset)]
        assert look(preset=preset) == seen[0]
        for file in (adapter, encoder, *([lora] if preset == "FACEID" else [])):
            replaced(file)
            seen.append(look(preset=preset))
        assert len(set(seen)) == len(seen), name
        replaced(another)
        assert look(preset=preset) == seen[-1], "a LoRA that no preset means"
        put("sd15", "base", f"new for {preset.split()[0]}")
        assert look(preset=preset) not in seen, name
        assert look(preset=None) == look(preset="unknown"), "over a wire"
    look = old["IPAdapterModelLoader"].fingerprint_inputs
    before = look(ipadapter_file="plus.safetensors")
    replaced(adapter)
    assert look(ipadapter_file="plus.safetensors") != before


def test_replaced_face_models_are_loaded_again(old, folders, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(folders / "insightface")], set()))
    home = folders / "insightface" / "models" / "buffalo_l"
    home.mkdir(parents=True)
    (home / "det_10g.onnx").write_bytes(b"1")
    (home / "w600k_r50.onnx").write_bytes(b"1")
    for name, given in (
        ("IPAdapterInsightFaceLoader", {"provider": "CPU", "model_name": "buffalo_l"}),
        ("IPAdapterUnifiedLoaderFaceID", {"preset": "FACEID"}),
    ):
        look = old[name].fingerprint_inputs
        before = look(**given)
        replaced(home / "w600k_r50.onnx")
        assert look(**given) != before, name
