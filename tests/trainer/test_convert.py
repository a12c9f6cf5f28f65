"""Any layout of any trainer -> the published one, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from ipadapter_core import (
    AdapterError,
    AdapterSpec,
    IPAdapter,
    export_state,
    load_adapter,
    read_checkpoint,
    spec_metadata,
)
from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import ExportError
from ipadapter_trainer.files.convert import convert
from ipadapter_trainer.files.diffusers_loader import unet_config
from ipadapter_trainer.files.opening import adapter_files, open_adapter, open_checkpoint
from ipadapter_trainer.files.writing import write_adapter
from ipadapter_trainer.settings.kinds import TRAIN_KINDS

Make = Callable[..., IPAdapter]


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def same(file: Path, adapter: IPAdapter) -> bool:
    state, wanted = export_state(load_adapter(file)), export_state(adapter)
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def published_bin(adapter: IPAdapter, file: Path, dtype: torch.dtype = torch.float16) -> Path:
    """As the original's README writes it."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in export_state(adapter).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor.to(dtype)
    torch.save(parts, file)
    return file


# ---- what the original's scripts leave behind


class Processor(nn.Module):
    """A layer as the original's processors have it: parameters of its own, shared by the UNet and the list."""

    def __init__(self, adapter: IPAdapter, id: int) -> None:
        super().__init__()
        for part in (adapter.layers if id % 2 else None, adapter.lora):
            for name, child in part.get_submodule(str(id)).named_children() if part is not None else ():
                self.add_module(name, child)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


@cache
def unet_of(spec: AdapterSpec) -> UNet2DConditionModel:
    """A UNet that an adapter fits. The next `WholeModel` takes it over."""
    config = unet_config(spec)
    assert config is not None
    return UNet2DConditionModel(**config)


class WholeModel(nn.Module):
    """The module that the original's scripts hand to Accelerate: its three parts under their names."""

    def __init__(self, adapter: IPAdapter) -> None:
        super().__init__()
        self.unet = unet_of(adapter.spec)
        names = list(self.unet.attn_processors)
        self.unet.set_attn_processor({name: Processor(adapter, id) for id, name in enumerate(names)})
        self.image_proj_model = adapter.projector
        self.adapter_modules = nn.ModuleList(self.unet.attn_processors.values())


def save_state(adapter: IPAdapter, folder: Path, *, safe: bool) -> Path:
    """A checkpoint as the scripts write it, by Accelerate itself."""
    model = WholeModel(adapter)
    for parameter in model.image_proj_model.parameters():
        parameter.requires_grad_(True)
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.image_proj_model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder), safe_serialization=safe)
    return folder


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("kind", "layout"), [("base", "sd15"), ("faceid", "sd15"), ("plus", "sdxl")])
def test_rescue_of_what_accelerate_saved(
    kind: str, layout: str, safe: bool, random_adapter: Make, tmp_path: Path
) -> None:
    adapter = random_adapter(kind, layout)
    folder = save_state(adapter, tmp_path / "checkpoint-2000", safe=safe)
    (dump,) = adapter_files(folder)
    assert dump.name == ("model.safetensors" if safe else "pytorch_model.bin")
    state = load_file(dump) if safe else torch.load(dump, weights_only=True)
    # The original's converter takes these keys and skips "unet.": with safetensors nothing is left for it.
    assert any(key.startswith("adapter_modules.") for key in state) != safe
    assert any(key.startswith("unet.") for key in state)

    for source in (folder, dump):
        for suffix in (".safetensors", ".bin"):
            written = convert(source, tmp_path / f"out{suffix}", force=True)
            assert same(written.file, adapter)
            assert len(written.verification.loaders) == 2
    assert (tmp_path / "out.safetensors").stat().st_size < dump.stat().st_size


@pytest.mark.parametrize("safe", [True, False])
def test_rescue_from_shards(safe: bool, random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter("base")
    folder = tmp_path / "model"
    Accelerator().save_model(WholeModel(adapter), str(folder), max_shard_size="100KB", safe_serialization=safe)
    shards = adapter_files(folder)
    assert len(shards) > 2
    assert open_checkpoint(folder).layout == "training-dump"
    assert same(convert(folder, tmp_path / "out.safetensors").file, adapter)
    code, out, _ = ipadapter("inspect", folder)
    assert code == 0
    assert "training-dump layout" in out

    shards[1].unlink()
    with pytest.raises(ExportError, match=rf"1 of its {len(shards)} shards are missing, the first is {shards[1].name}"):
        convert(folder, tmp_path / "again.safetensors")
    (index,) = folder.glob("*.index.json")
    for text in ("{", "[]", "{}", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ExportError, match=r"not an index of shards|empty"):
            convert(folder, tmp_path / "again.safetensors")


def test_rescue_of_a_wrapped_model_and_of_deepspeeds_file(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter("base")
    state = {f"module.{key}": tensor for key, tensor in WholeModel(adapter).state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(convert(tmp_path / "pytorch_model.bin", tmp_path / "one.safetensors").file, adapter)
    (tmp_path / "checkpoint" / "pytorch_model").mkdir(parents=True)
    content = {"module": WholeModel(adapter).state_dict(), "ds_version": "0.16", "global_steps": 7}
    torch.save(content, tmp_path / "checkpoint" / "pytorch_model" / "mp_rank_00_model_states.pt")
    assert same(convert(tmp_path / "checkpoint", tmp_path / "two.safetensors").file, adapter)


def test_an_empty_export_is_named(random_adapter: Make, tmp_path: Path) -> None:
    """What the original's converter makes of a safetensors dump."""
    projector = {key: t for key, t in export_state(random_adapter()).items() if key.startswith("image_proj.")}
    save_file(projector, tmp_path / "empty.safetensors")
    code, _, err = ipadapter("convert", tmp_path / "empty.safetensors", tmp_path / "o.bin")
    assert code == 2
    assert "0 'ip_adapter' tensors: the export came out empty. Convert the training checkpoint" in err


# ---- round trips


@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_round_trip_is_bitwise(kind: str, random_adapter: Make, tmp_path: Path) -> None:
    first = published_bin(random_adapter(kind), tmp_path / "a.bin")
    shortcut = TRAIN_KINDS[kind].shortcut
    second = convert(first, tmp_path / "a.safetensors", shortcut=shortcut).file
    third = convert(second, tmp_path / "b.bin").file
    fourth = convert(third, tmp_path / "b.safetensors", shortcut=shortcut).file
    fifth = convert(fourth, tmp_path / "c.bin").file
    before, after = (torch.load(file, weights_only=True) for file in (first, third))
    assert {part: list(tensors) for part, tensors in before.items()} == {p: list(t) for p, t in after.items()}
    for part, tensors in before.items():
        for key, tensor in tensors.items():
            assert tensor.dtype == after[part][key].dtype == torch.float16
            assert torch.equal(tensor, after[part][key])
    for one, other in ((second, fourth), (third, fifth)):
        contents = [read_checkpoint(file) for file in (one, other)]
        assert contents[0].metadata == contents[1].metadata
        states = [export_state(load_adapter(file, shortcut=shortcut)) for file in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_trainers_own_layout(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter()
    names = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    state = export_state(adapter)
    for old, new in names.items():
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors").file
    assert same(out, adapter)
    assert load_adapter(out).metadata == spec_metadata(adapter.spec)


def test_metadata_and_mixed_dtypes_survive(random_adapter: Make, tmp_path: Path) -> None:
    state = export_state(random_adapter("plus"))
    state = {key: tensor.bfloat16() if ".norm" in key else tensor for key, tensor in state.items()}
    metadata = {"ipadapter.steps": "7", "ipadapter.encoder": "mine", "author": "me"}
    save_file(state, tmp_path / "a.safetensors", metadata=metadata)
    written = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert written.verification.dtypes == ("bfloat16", "float32")
    assert metadata.items() <= load_adapter(written.file).metadata.items()
    assert {key: t.dtype for key, t in load_file(written.file).items()} == {key: t.dtype for key, t in state.items()}
    half = convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", dtype=torch.float16)
    assert half.verification.dtypes == ("float16",)


# ---- v1 and v2


def test_the_version_is_written_down(random_adapter: Make, tmp_path: Path) -> None:
    file = published_bin(random_adapter("faceid-plusv2"), tmp_path / "ip-adapter-faceid-plusv2_sd15.bin")
    out = tmp_path / "plusv2.safetensors"
    code, _, err = ipadapter("convert", file, out)
    assert code == 0
    assert "does not say whether it is v1 or v2. The name ip-adapter-faceid-plusv2_sd15.bin suggests v2. Add" in err
    assert load_adapter(out).spec.shortcut is None
    for version, shortcut in (("v1", False), ("v2", True)):
        code, _, err = ipadapter("convert", file, out, "--version", version, "--force")
        assert code == 0
        assert load_adapter(out).spec.shortcut is shortcut
        assert ("has 'plusv2' in it, but this is faceid-plus v1" in err) == (version == "v1")
    # A wrong claim in a header can be put right.
    convert(out, tmp_path / "v1.safetensors", shortcut=False)
    assert load_adapter(tmp_path / "v1.safetensors").spec.shortcut is False


def test_a_folder_needs_the_version_for_a_name(random_adapter: Make, tmp_path: Path) -> None:
    file = published_bin(random_adapter("faceid-plus"), tmp_path / "some.bin")
    (tmp_path / "out").mkdir()
    code, _, err = ipadapter("convert", file, tmp_path / "out")
    assert (code, list((tmp_path / "out").iterdir())) == (2, [])
    assert "ipadapter convert --version v2" in err
    code, out, _ = ipadapter("convert", file, tmp_path / "out", "--version", "v2")
    assert code == 0
    assert f"Saved {tmp_path / 'out' / 'ip-adapter-faceid-plusv2_context-64.safetensors'}" in out


# ---- the command


def test_convert_as_a_user_types_it(random_adapter: Make, tmp_path: Path, run_ipadapter: Any) -> None:
    file = published_bin(random_adapter("plus"), tmp_path / "ip-adapter-plus_sd15.bin")
    process = run_ipadapter("convert", file, tmp_path / "new" / "a.safetensors", "--dtype", "bfloat16")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Checked: 83 tensors in bfloat16, read back with ipadapter_core and diffusers" in out
    assert out.splitlines()[-1] == f"Saved {tmp_path / 'new' / 'a.safetensors'}"
    assert not err.strip()


def test_convert_names_what_is_wrong(random_adapter: Make, tmp_path: Path) -> None:
    file = published_bin(random_adapter(), tmp_path / "a.bin")
    (tmp_path / "link.bin").symlink_to(file)
    (tmp_path / "there.bin").write_text("x")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "optimizer.bin").write_text("x")
    before = file.read_bytes()
    cases: list[tuple[list[str | Path], str]] = [
        (["/nowhere.bin", tmp_path / "o.bin"], "/nowhere.bin: no such file"),
        ([tmp_path / "lora.safetensors", tmp_path / "o.bin"], "an empty file (0 bytes)"),
        ([folder, tmp_path / "o.bin"], "no adapter in this folder (found: optimizer.bin)"),
        ([file, tmp_path / "o.ckpt"], "the suffix '.ckpt' is unknown. Use .safetensors or .bin, or a folder."),
        ([file, file], "is the file that is read"),
        ([file, file, "--force"], "is the file that is read"),
        ([file, tmp_path / "link.bin", "--force"], "is the file that is read"),
        ([file, tmp_path / "there.bin"], "exists already"),
        ([file, tmp_path / "o.bin", "--dtype", "half"], "dtype 'half' is unknown"),
        ([file, tmp_path / "o.bin", "--version", "2"], "--version 2: expected v1 or v2"),
        ([file, tmp_path / "o.bin", "--version", "v2"], "is for faceid-plus adapters; this is a base adapter"),
    ]
    for arguments, words in cases:
        code, _, err = ipadapter("convert", *arguments)
        assert (code, "Traceback" in err, len(err.strip().splitlines())) == (2, False, 1), err
        assert words in err
    assert not (tmp_path / "o.bin").exists()
    assert (file.read_bytes(), (tmp_path / "there.bin").read_text()) == (before, "x")
    assert ipadapter("convert", file, tmp_path / "there.bin", "--force")[0] == 0
    assert same(tmp_path / "there.bin", load_adapter(file))


def test_a_folder_that_cannot_be_written_to(random_adapter: Make, tmp_path: Path) -> None:
    file = published_bin(random_adapter(), tmp_path / "a.bin")
    code, _, err = ipadapter("convert", file, "/proc/nowhere/a.safetensors")
    assert (code, "Traceback" in err) == (2, False)
    assert "/proc/nowhere" in err


def test_a_damaged_file_is_not_converted(random_adapter: Make, tmp_path: Path) -> None:
    file = published_bin(random_adapter(), tmp_path / "a.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="truncated"):
        convert(file, tmp_path / "b.safetensors")
    adapter = random_adapter()
    adapter.layers.get_submodule("7").to_k_ip.weight[0, 0] = torch.nan
    published_bin(adapter, file)
    with pytest.raises(AdapterError, match=r"7\.to_k_ip\.weight holds NaN"):
        convert(file, tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_where_the_adapter_of_a_folder_is(random_adapter: Make, tmp_path: Path) -> None:
    """The newest complete checkpoint before the export beside them, which may be older."""
    run = tmp_path / "run"
    for step in (9, 10, 11):
        folder = run / f"checkpoint-{step:06d}"
        folder.mkdir(parents=True)
        write_adapter(folder / "adapter.safetensors", random_adapter(seed=step), verify=False)
        if step != 11:  # killed while it was written by something else than us
            (folder / "training.pt").write_text("x")
    shutil.copy(run / "checkpoint-000009" / "adapter.safetensors", run)
    assert adapter_files(run) == (run / "checkpoint-000010" / "adapter.safetensors",)
    assert adapter_files(run / "checkpoint-000009") == (run / "checkpoint-000009" / "adapter.safetensors",)
    shutil.rmtree(run / "checkpoint-000009")
    shutil.rmtree(run / "checkpoint-000010")
    assert adapter_files(run) == (run / "adapter.safetensors",)
    (run / "adapter.safetensors").rename(run / "ip-adapter_sd15.safetensors")
    assert adapter_files(run) == (run / "ip-adapter_sd15.safetensors",)
    assert torch.equal(open_adapter(run).projector.proj.weight, random_adapter(seed=9).projector.proj.weight)
    shutil.copy(run / "ip-adapter_sd15.safetensors", run / "ip-adapter_other.safetensors")
    with pytest.raises(ExportError, match=r"ip-adapter_other.safetensors, ip-adapter_sd15.safetensors"):
        adapter_files(run)


def test_inspect_of_a_folder(random_adapter: Make, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.safetensors", random_adapter("faceid"), verify=False)
    code, out, _ = ipadapter("inspect", tmp_path, "--json")
    assert (code, json.loads(out)["kind"]) == (0, "faceid")
    assert json.loads(out)["file"] == str(tmp_path / "adapter.safetensors")
    (tmp_path / "sub").mkdir()
    code, _, err = ipadapter("inspect", tmp_path / "sub")
    assert code == 2
    assert "no adapter in this folder" in err
