"""Load IP Adapter: files of the model folders, and the encoder found by its shapes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 48,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
}


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """Empty models/ipadapter and models/clip_vision folders."""
    import folder_paths

    places = {}
    for name in ("ipadapter", "clip_vision"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
        places[name] = tmp_path / name
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return places


@pytest.fixture
def encoder_state(comfyui):
    """The state dict of a ViT-H-shaped but narrow CLIP vision model."""
    import comfy.clip_model
    import comfy.ops

    config = {**VISION, "num_hidden_layers": 32, "model_type": "clip_vision_model"}
    with torch.device("cpu"):
        model = comfy.clip_model.CLIPVisionModelProjection(config, torch.float32, "cpu", comfy.ops.manual_cast)
    return {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}


def test_the_files_are_listed(pack, folders):
    for name in ("b.safetensors", "a.bin", "readme.txt"):
        (folders["ipadapter"] / name).touch()
    assert pack.load.list_files("ipadapter") == ["a.bin", "b.safetensors"]


def test_auto_finds_the_encoder_by_shape(pack, world, folders, encoder_state, monkeypatch):
    import comfy.clip_vision

    pack.core.save_adapter(folders["ipadapter"] / "x.safetensors", world.adapter.adapter)
    save_file({"some.weight": torch.zeros(2)}, folders["clip_vision"] / "a wrong one.safetensors")
    save_file(encoder_state, folders["clip_vision"] / "named after nothing.safetensors")
    loaded = []
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: loaded.append(Path(path).name) or "encoder")
    output = pack.LoadIPAdapter.execute("x.safetensors")
    assert loaded == ["named after nothing.safetensors"]
    adapter, encoder = output.args
    assert encoder == "encoder"
    assert adapter.spec.kind == "base" and adapter.name == "x.safetensors"
    assert hasattr(adapter, "patcher")
    patched = world.apply(world.model, adapter, world.new_prompt(adapter))
    same = world.apply(world.model, world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(patched), world.sample(same), atol=1e-3, rtol=1e-4)


def test_weights_only_bin(pack, world, folders, monkeypatch):
    adapter = world.adapter.adapter
    state = {"image_proj": adapter.projector.state_dict(), "ip_adapter": adapter.layers.state_dict()}
    torch.save(state, folders["ipadapter"] / "x.bin")
    monkeypatch.setattr(pack.load, "load_encoder", lambda *_: "encoder")
    assert pack.LoadIPAdapter.execute("x.bin").args[0].spec == adapter.spec


def test_a_pickle_with_code_is_refused(pack, folders):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"image_proj": Evil()}, folders["ipadapter"] / "evil.bin")
    with pytest.raises(pack.core.AdapterError, match="nothing was executed"):
        pack.LoadIPAdapter.execute("evil.bin")


def test_no_encoder_says_which_one_to_download(pack, world, folders):
    context, widths = pack.core.FAMILIES["sd15"]
    spec = pack.core.new_spec("plus", widths, context)
    (folders["clip_vision"] / "note.safetensors").write_bytes(b"x")
    with pytest.raises(pack.core.AdapterError) as error:
        pack.load.load_encoder("auto", "plus.safetensors", spec)
    for words in ("plus.safetensors", "hidden states of 1280", "h94/IP-Adapter", "note.safetensors", "clip_vision"):
        assert words in str(error.value)


def test_a_path_outside_the_folder_is_refused(pack, folders, tmp_path):
    (tmp_path / "outside.safetensors").touch()
    with pytest.raises((FileNotFoundError, ValueError)):
        pack.LoadIPAdapter.execute("../outside.safetensors")


def test_a_replaced_file_runs_again(pack, world, folders):
    file = folders["ipadapter"] / "x.safetensors"
    file.write_bytes(b"one")
    first = pack.LoadIPAdapter.fingerprint_inputs("x.safetensors")
    assert pack.LoadIPAdapter.fingerprint_inputs("x.safetensors") == first
    file.write_bytes(b"three")
    second = pack.LoadIPAdapter.fingerprint_inputs("x.safetensors")
    assert second != first
    import folder_paths

    folder_paths.filename_list_cache.clear()
    (folders["clip_vision"] / "new.safetensors").write_bytes(b"x")
    assert pack.LoadIPAdapter.fingerprint_inputs("x.safetensors") != second


def test_a_name_that_comes_over_a_wire_is_no_reason_to_run_again(pack, folders):
    """ComfyUI passes None for it; an error here would make the node, and all after it, run with every prompt."""
    loader = pack.LoadIPAdapter
    assert loader.fingerprint_inputs(None, "auto") == loader.fingerprint_inputs(None, "auto")
    assert loader.fingerprint_inputs(None, None)
