"""Load IP Adapter: files of the model folders, and the encoder found by its shapes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def test_the_files_are_listed(pack, folders):
    for name in ("b.safetensors", "a.bin", "readme.txt"):
        (folders["ipadapter"] / name).touch()
    assert pack.files.list_files("ipadapter") == ["a.bin", "b.safetensors"]


def test_auto_finds_the_encoder_by_shape(pack, world, folders, narrow, sound_state):
    pack.core.save_adapter(folders["ipadapter"] / "x.safetensors", world.adapter.adapter)
    save_file({"some.weight": torch.zeros(2)}, folders["clip_vision"] / "a wrong one.safetensors")
    save_file(sound_state, folders["clip_vision"] / "named after nothing.safetensors")
    output = pack.LoadIPAdapter.execute("x.safetensors")
    adapter, encoder = output.args
    assert encoder.model.state_dict().keys() == sound_state.keys()
    assert adapter.spec.kind == "base" and adapter.name == "x.safetensors"
    assert hasattr(adapter, "patcher")
    found = "Image encoder: named after nothing.safetensors, 32 pixels."
    assert output.ui.as_dict()["text"] == (f"{adapter.spec.describe()}. {found}",)
    patched = world.apply(world.model, adapter, world.new_prompt(adapter))
    same = world.apply(world.model, world.adapter, world.prompt)
    torch.testing.assert_close(world.sample(patched), world.sample(same), atol=1e-3, rtol=1e-4)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def write_unreadable(folder):
    """Files that are no encoders; for each the reason in the list of all files, and words for when it was chosen."""
    torch.save({"x": torch.zeros(99)}, folder / "0 cut.pth")
    (folder / "0 cut.pth").write_bytes((folder / "0 cut.pth").read_bytes()[:300])
    (folder / "1 page.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "2 pointer.bin").write_text("version https://git-lfs.github.com/spec/v1")
    torch.save({"vision_model": Evil()}, folder / "3 evil.pt")
    torch.save({"some.weight": torch.zeros(2)}, folder / "4 other.pt")
    (folder / "5 empty.safetensors").touch()
    return {
        "0 cut.pth": ("truncated or not a PyTorch file", "Download it again"),
        "1 page.pth": ("a web page, not the file itself", "Download it again"),
        "2 pointer.bin": ("a Git LFS pointer, not the file itself", "Download it again"),
        "3 evil.pt": ("the pickle holds Python objects", "could run code; nothing was executed"),
        "4 other.pt": ("not a CLIP vision model", "x needs"),
        "5 empty.safetensors": ("an empty file", "Download it again"),
    }


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize("form", ["zip", "pickle", "nested"])
def test_auto_finds_an_encoder_of_pytorch(pack, world, folders, narrow, sound_state, suffix, form):
    """Among files that cannot be read, by its tensors, as safetensors are."""
    write_unreadable(folders["clip_vision"])
    content = {"state_dict": sound_state} if form == "nested" else sound_state
    file = folders["clip_vision"] / f"named after nothing{suffix}"
    torch.save(content, file, _use_new_zipfile_serialization=form != "pickle")
    assert file.name in pack.files.list_files("clip_vision")
    encoder = pack.load.load_encoder("auto", "x", world.adapter.spec)
    loaded = encoder.model.state_dict()
    assert loaded.keys() == sound_state.keys()
    for key, tensor in sound_state.items():
        torch.testing.assert_close(loaded[key].float(), tensor.float(), atol=1e-2, rtol=1e-2)  # fp16 on some machines
    assert pack.load.load_encoder(file.name, "x", world.adapter.spec).model.state_dict().keys() == loaded.keys()


def test_safetensors_come_first(pack, world, folders, narrow, sound_state):
    """What auto took before PyTorch files were offered is what it takes now."""
    torch.save({key: 2 * tensor for key, tensor in sound_state.items()}, folders["clip_vision"] / "a.pth")
    save_file(sound_state, folders["clip_vision"] / "b.safetensors")
    weight = pack.load.load_encoder("auto", "x", world.adapter.spec).model.visual_projection.weight
    torch.testing.assert_close(weight.float(), sound_state["visual_projection.weight"], atol=1e-2, rtol=1e-2)


def test_why_each_file_is_no_encoder(pack, world, folders):
    reasons = write_unreadable(folders["clip_vision"])
    with pytest.raises(pack.core.AdapterError) as error:
        pack.load.load_encoder("auto", "x", world.adapter.spec)
    for name, (reason, _) in reasons.items():
        assert f"{name} ({reason})" in str(error.value)
    for name, words in reasons.items():
        with pytest.raises(pack.core.AdapterError) as error:
            pack.load.load_encoder(name, "x", world.adapter.spec)
        for text in (str(folders["clip_vision"] / name), *words):
            assert text in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_encoder_with_a_tail_of_zeros(pack, world, folders, narrow, sound_state, suffix):
    """A download that broke off and was filled up."""
    sound_state["vision_model.encoder.layers.30.mlp.fc2.weight"].zero_()
    sound_state["vision_model.encoder.layers.31.mlp.fc2.weight"].zero_()
    file = folders["clip_vision"] / f"zeros{suffix}"
    save_file(sound_state, file) if suffix == ".safetensors" else torch.save(sound_state, file)
    for name in ("auto", file.name):
        with pytest.raises(pack.core.AdapterError) as error:
            pack.load.load_encoder(name, "x", world.adapter.spec)
        for words in (str(file), "layers.30.mlp.fc2.weight", "are zero", "Download it again"):
            assert words in str(error.value)


def test_a_suffix_of_another_format(pack, world, folders, narrow, sound_state):
    """ComfyUI goes by the suffix."""
    save_file(sound_state, folders["clip_vision"] / "misnamed.bin")
    with pytest.raises(pack.core.AdapterError, match=r"misnamed\.bin: ComfyUI cannot load it .* suffix"):
        pack.load.load_encoder("auto", "x", world.adapter.spec)


PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@pytest.mark.parametrize("suffix", [".sft", *PICKLES])
def test_adapters_of_every_suffix(pack, world, folders, narrow, sound_state, suffix):
    adapter, name = world.adapter.adapter, f"x{suffix}"
    if suffix == ".sft":
        pack.core.save_adapter(folders["ipadapter"] / "x.safetensors", adapter)
        (folders["ipadapter"] / "x.safetensors").rename(folders["ipadapter"] / name)
    else:
        state = {"image_proj": adapter.projector.state_dict(), "ip_adapter": adapter.layers.state_dict()}
        torch.save(state, folders["ipadapter"] / name)
    save_file(sound_state, folders["clip_vision"] / "e.safetensors")
    assert pack.files.list_files("ipadapter") == [name]
    assert pack.LoadIPAdapter.execute(name).args[0].spec == adapter.spec


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_with_code_is_refused(pack, folders, suffix):
    torch.save({"image_proj": Evil()}, folders["ipadapter"] / f"evil{suffix}")
    with pytest.raises(pack.core.AdapterError, match="nothing was executed"):
        pack.LoadIPAdapter.execute(f"evil{suffix}")


def test_the_help_page_lists_every_suffix(pack):
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / "LoadIPAdapter.md").read_text(encoding="utf-8")
    suffixes = pack.files._SUFFIXES
    assert suffixes["ipadapter"] == suffixes["clip_vision"] and set(PICKLES) < set(suffixes["ipadapter"])
    (row,) = (line for line in page.splitlines() if line.startswith("| `ipadapter_name`"))
    assert set(re.findall(r"`(\.\w+)`", row)) == set(suffixes["ipadapter"])


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
    for listed in (False, True):
        with pytest.raises(pack.core.AdapterError, match="Choose one of: in.safe" if listed else "There is no adapter"):
            pack.LoadIPAdapter.execute("../outside.safetensors")
        (folders["ipadapter"] / "in.safetensors").touch()
        import folder_paths

        folder_paths.filename_list_cache.clear()


def test_a_link_to_a_file_that_is_gone(pack, world, folders, narrow, sound_state):
    """ComfyUI lists it."""
    pack.core.save_adapter(folders["ipadapter"] / "x.safetensors", world.adapter.adapter)
    for folder in folders.values():
        (folder / "link.safetensors").symlink_to(folder / "gone.safetensors")
        assert "link.safetensors" in pack.files.list_files(folder.name)
    for name, encoder, folder in (
        ("link.safetensors", "auto", "ipadapter"),
        ("x.safetensors", "link.safetensors", "clip_vision"),
    ):
        with pytest.raises(pack.core.AdapterError) as error:
            pack.LoadIPAdapter.execute(name, encoder)
        assert f"link.safetensors is not in {folders[folder]}, or it is a link to a file that is gone" in str(
            error.value
        )


def test_a_choice_of_an_empty_list_says_where_files_belong(pack, world, folders):
    """As when the chosen file was deleted, and ComfyUI does not look into the list."""
    for name in ("deleted.safetensors", pack.files.choices("ipadapter")[0]):
        with pytest.raises(pack.core.AdapterError, match=r"There is no adapter in .*Download ip-adapter-plus_sd15"):
            pack.LoadIPAdapter.execute(name)
    pack.core.save_adapter(folders["ipadapter"] / "x.safetensors", world.adapter.adapter)
    import folder_paths

    folder_paths.filename_list_cache.clear()
    with pytest.raises(pack.core.AdapterError, match=r"clip_vision_name is 'deleted.sft'. Choose one of: auto\."):
        pack.LoadIPAdapter.execute("x.safetensors", "deleted.sft")


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
