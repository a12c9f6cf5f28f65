"""Layouts, laziness, and every malformed file that people really pick."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ipadapter_core as ic


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A small adapter of three layers under its published keys."""
    torch.manual_seed(0)
    spec = ic.new_spec("base", [8, 16, 24], 24, image_dim=20)
    return {key: tensor.detach() for key, tensor in ic.export_state(ic.IPAdapter(spec)).items()}


def same(checkpoint: ic.AdapterCheckpoint, state: dict[str, Tensor]) -> bool:
    parts = {"image_proj": checkpoint.image_proj, "ip_adapter": checkpoint.ip_adapter}
    found = {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def nested(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = tensor
    return parts


def trainer_names(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    names = {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}
    return {f"{prefix}{names[(p := k.partition('.'))[0]]}.{p[2]}": t for k, t in state.items()}


def test_layouts(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "adapter"
    cases: list[tuple[str, Callable[[], None]]] = [
        ("flat", lambda: torch.save(nested(state), path)),
        ("flat", lambda: torch.save(state, path)),
        ("flat", lambda: torch.save(nested(state), path, _use_new_zipfile_serialization=False)),
        ("flat", lambda: save_file(state, path)),
        ("trainer", lambda: save_file(trainer_names(state), path)),
        ("trainer", lambda: torch.save(trainer_names(state), path)),
        ("trainer", lambda: save_file(trainer_names(state, "module."), path)),
    ]
    for layout, write in cases:
        write()
        checkpoint = ic.read_checkpoint(path)
        assert checkpoint.layout == layout
        assert same(checkpoint, state)
        path.unlink()


def test_shapes_and_dtypes_without_reading(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({k: t.half() for k, t in state.items()}, tmp_path / "a.safetensors", metadata={"note": "x"})
    checkpoint = ic.read_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.metadata == {"note": "x"}
    assert checkpoint.ip_adapter.shapes["3.to_k_ip.weight"] == (16, 24)
    assert checkpoint.ip_adapter.dtypes["3.to_k_ip.weight"] == torch.float16
    assert "3.to_k_ip.weight" in checkpoint.ip_adapter and len(checkpoint.ip_adapter) == 6


def test_safetensors_is_recognised_whatever_its_header_length(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """The length comes first; its low byte is that of a pickle (0x80) or of '<' in some files."""
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for padding in range(256):
        header = content[8 : 8 + length] + b" " * padding
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        assert ic.read_checkpoint(path).layout == "flat"


def write_sparse_sdxl(path: Path, shapes: dict[str, Any]) -> int:
    header: dict[str, Any] = {}
    offset = 0
    for part in ("image_proj", "ip_adapter"):
        for key, shape in shapes[part].items():
            size = 2 * torch.Size(shape).numel()
            offsets = [offset, offset + size]
            header[f"{part}.{key}"] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
            offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + offset)
    return path.stat().st_size


def test_a_700_mb_file_opens_at_once(tmp_path: Path, weight_keys: Any) -> None:
    path = tmp_path / "sdxl.safetensors"
    assert write_sparse_sdxl(path, weight_keys["sdxl"]["base_vith"]) > 690_000_000
    ic.infer_spec(ic.read_checkpoint(path))  # warm the file cache and the imports
    start = time.perf_counter()
    spec = ic.infer_spec(ic.read_checkpoint(path))
    assert time.perf_counter() - start < 0.1
    assert spec.family == "sdxl"


def training_dump(unet: Any, adapter: ic.IPAdapter) -> dict[str, Tensor]:
    """The state of tencent's training module, deduplicated by accelerate as its checkpoints are."""
    from accelerate import PartialState
    from accelerate.utils.other import clean_state_dict_for_safetensors

    PartialState()  # accelerate's logger asks for it

    names = list(unet.attn_processors)
    modules = [torch.nn.Module() for _ in names]
    for id, module in enumerate(modules):
        for part in (adapter.layers if id % 2 else None, adapter.lora):
            for name, child in part.get_submodule(str(id)).named_children() if part else ():
                module.add_module(name, child)
    whole = torch.nn.Module()
    whole.unet, whole.image_proj_model = unet, adapter.projector
    for name, module in zip(names, modules, strict=True):
        unet.get_submodule(name.removesuffix(".processor")).set_processor(module)
    whole.adapter_modules = torch.nn.ModuleList(unet.attn_processors.values())
    return clean_state_dict_for_safetensors(whole.state_dict())


@pytest.mark.parametrize("kind", ["base", "faceid"])
def test_rescue_of_a_training_dump(tmp_path: Path, layout: str, new_unet: Any, new_adapter: Any, kind: str) -> None:
    unet = new_unet(layout)
    adapter = new_adapter(unet, kind)
    dump = training_dump(unet, adapter)
    assert not any(key.startswith("adapter_modules.") for key in dump)  # what the original's converter would look for
    keys = list(dump)
    random.Random(0).shuffle(keys)
    save_file({key: dump[key].contiguous() for key in keys}, tmp_path / "model.safetensors")
    checkpoint = ic.read_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.layout == "training-dump"
    assert same(checkpoint, ic.export_state(adapter))


def test_processor_names_instead_of_ids(weight_keys: Any, state: dict[str, Tensor]) -> None:
    """The layout that a public quick fix wrote (tencent #168); order checked against the golden names."""
    for family in ("sd15", "sdxl"):
        names = weight_keys[family]["attn_processor_names"]
        cross = [(2 * i + 1, n) for i, n in enumerate(n for n in names if ".attn2." in n)]
        random.Random(0).shuffle(cross)
        layers = {f"ip_adapter.{n}.to_{p}_ip.weight": torch.full((2, 24), i) for i, n in cross for p in "kv"}
        projector = {k: t for k, t in state.items() if k.startswith("image_proj.")}
        checkpoint = ic.checkpoint_from_state(projector | {k: t.float() for k, t in layers.items()})
        assert all(checkpoint.ip_adapter[k][0, 0] == int(k.split(".")[0]) for k in checkpoint.ip_adapter)
        assert len(checkpoint.ip_adapter) == 2 * len(cross)


# ---- malformed files


class Payload:
    """Creates a file if the pickle is ever executed."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def t(*shape: int) -> Tensor:
    return torch.zeros(shape)


OTHER_MODELS: dict[str, tuple[dict[str, Tensor], str]] = {
    "lora": ({"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": t(4, 8)}, "a LoRA"),
    "peft": ({"unet.mid_block.attn1.to_q.lora_A.weight": t(4, 8)}, "a LoRA"),
    "old lora": ({"unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight": t(1)}, "a LoRA"),
    "ldm lora": (
        {f"model.diffusion_model.input_blocks.1.1.proj_in.{name}": t(1) for name in ("lora_down.weight", "alpha")},
        "a LoRA",
    ),
    "checkpoint with lora": (
        {"model.diffusion_model.out.2.weight": t(1), "lora_unet_out.lora_up.weight": t(1)},
        "a full checkpoint",
    ),
    "checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": t(1)}, "a full checkpoint"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": t(1)}, "a ControlNet"),
    "controlnet2": (
        {"controlnet_cond_embedding.conv_in.weight": t(1), "down_blocks.0.attn2.to_k.weight": t(1)},
        "a ControlNet",
    ),
    "unet": ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": t(1)}, "a UNet"),
    "clip": ({"vision_model.embeddings.class_embedding": t(1)}, "an image encoder"),
    "flux": ({"ip_adapter_proj_model.proj.weight": t(1)}, "FLUX"),
    "nothing": ({}, "empty"),
    "unknown": ({"foo": t(1)}, "'foo'"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models(tmp_path: Path, name: str) -> None:
    tensors, message = OTHER_MODELS[name]
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(ic.AdapterError, match=rf"other.safetensors.*{message}"):
        ic.read_checkpoint(path)


def test_a_checkpoint_inside_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": t(1)}}, tmp_path / "sd.ckpt")
    with pytest.raises(ic.AdapterError, match=r"sd.ckpt: looks like a full checkpoint"):
        ic.read_checkpoint(tmp_path / "sd.ckpt")


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, write: Any) -> None:
    spec = ic.new_spec("base", [2], 2, image_dim=2)
    path = tmp_path / "flipped"
    write({k: v.detach() for k, v in ic.export_state(ic.IPAdapter(spec)).items()}, path)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            ic.load_adapter(path)
        except ic.AdapterError as error:
            assert "flipped" in str(error)


JUNK: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(64), "JPEG image"),
    "bytes": (b"\x01\x02\x03 anything", "neither safetensors"),
    "zero bytes": (bytes(100), "zero bytes.*Download it again"),
    "server's answer": (b"Entry not found", "a text file that begins with 'Entry not found'.*Download it again"),
    "json": (b'{"a":   {"b": 1}}', "a JSON file"),
    "web page": (b"<!DOCTYPE html><html>", "web page.*Download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer.*Download it again"),
    "zip": (b"PK\x03\x04" + bytes(100), "truncated or not a PyTorch file"),
    "bad header": ((20).to_bytes(8, "little") + b'{"a": [1, 2, 3]    }', "header is damaged"),
    "half header": ((900).to_bytes(8, "little") + b'{"a": ', "14 bytes, its header says 908"),
    "huge header": ((1 << 40).to_bytes(8, "little") + b'{"a": ', "1099511627776"),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk(tmp_path: Path, name: str) -> None:
    content, message = JUNK[name]
    path = tmp_path / "junk.safetensors"
    path.write_bytes(content)
    with pytest.raises(ic.AdapterError, match=rf"(?s)junk.safetensors.*{message}"):
        ic.read_checkpoint(path)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ic.AdapterError, match=r"a.safetensors: holds tensors of the type F4, which is not read"):
        ic.read_checkpoint(tmp_path / "a.safetensors")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ic.AdapterError, match=r"nowhere.bin: no such file"):
        ic.read_checkpoint(tmp_path / "nowhere.bin")
    with pytest.raises(ic.AdapterError, match=r"a folder"):
        ic.read_checkpoint(tmp_path)


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_truncated(tmp_path: Path, state: dict[str, Tensor], write: Any) -> None:
    path = tmp_path / "half"
    write(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ic.AdapterError, match=rf"half: truncated.*{len(whole) // 2}"):
        ic.read_checkpoint(path)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_never_runs(tmp_path: Path, state: dict[str, Tensor], dump: Any) -> None:
    path, target = tmp_path / "evil.bin", tmp_path / "ran"
    for content in (Payload(target), {"image_proj": state, "ip_adapter": Payload(target)}):
        dump(content, path)
        with pytest.raises(ic.AdapterError, match=r"evil.bin"):
            ic.load_adapter(path)
        assert not target.exists()


def test_code_in_a_pickle_is_named(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "evil.bin")
    with pytest.raises(ic.AdapterError, match=r"system.*could run code; nothing was executed"):
        ic.read_checkpoint(tmp_path / "evil.bin")


def test_a_pickled_tensor(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "t.bin")
    with pytest.raises(ic.AdapterError, match=r"one Tensor; expected a dict"):
        ic.read_checkpoint(tmp_path / "t.bin")


def without(*keys: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k: v for k, v in state.items() if not any(k.startswith(key) for key in keys)}


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {key: change(state.get(key, torch.zeros(8, 24)))}


def shift_ids(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """InstantX numbers its FLUX layers 0, 1, 2."""
    return {k.replace("r.1.", "r.0.").replace("r.3.", "r.1.").replace("r.5.", "r.2."): v for k, v in state.items()}


V3 = "ip_adapter.3.to_v_ip.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing layer": (without("ip_adapter.3."), "layer 3 is missing.*2 layers.*expected 3"),
    "missing first layer": (without("ip_adapter.1."), "layer 1 is missing"),
    "to_k without to_v": (without(V3), "layer 3 has to_k_ip but no to_v_ip"),
    "to_v without to_k": (without(V3.replace("v_ip", "k_ip")), "layer 3 has to_v_ip but no to_k_ip"),
    "no layers": (without("ip_adapter."), "0 'ip_adapter' tensors.*empty"),
    "no projector": (without("image_proj."), "0 'image_proj' tensors"),
    "half a projector": (without("image_proj.norm."), "projector is incomplete"),
    "no bias": (without("image_proj.proj.bias"), "proj.bias is missing, expected"),
    "strange projector": (without("image_proj.proj."), "unknown image projector"),
    "integers": (put(V3, lambda x: x.to(torch.int32)), "3.to_v_ip.weight is torch.int32; expected"),
    "other width": (
        put(V3, lambda x: x[:, :5].contiguous()),
        r"layer 3 has to_k_ip \[16, 24\] and to_v_ip \[16, 5\]",
    ),
    "other context": (put("image_proj.norm.weight", lambda x: x[:12].contiguous()), "tokens of 12.*take 24"),
    "odd rows": (put("image_proj.proj.weight", lambda x: x[:95].contiguous()), "95 numbers.*tokens of 24"),
    "even ids": (shift_ids, r"an IP-Adapter for FLUX or another diffusion transformer .*numbered 0, 1, 2"),
    "strange tensor": (
        put("ip_adapter.1.norm_q.weight", lambda x: x),
        "unexpected tensor ip_adapter.1.norm_q.weight",
    ),
    "extra projector tensor": (put("image_proj.more.weight", lambda x: x), "unexpected tensors.*more.weight"),
    "half a LoRA": (
        put("ip_adapter.0.to_q_lora.down.weight", lambda x: x[:2, :8].contiguous()),
        "LoRA tensor 0.to_q",
    ),
    "NaN": (put(V3, lambda x: x.clone().fill_(float("nan"))), "3.to_v_ip.weight holds NaN or infinity"),
    "infinity": (put("image_proj.proj.bias", lambda x: x / 0), "proj.bias holds NaN or infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    change, message = BROKEN[name]
    save_file(change(state), tmp_path / "broken.safetensors")
    with pytest.raises(ic.AdapterError, match=rf"broken.safetensors.*{message}"):
        ic.load_adapter(tmp_path / "broken.safetensors")


def test_not_finite_weights_are_found_when_read_and_not_before(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bad = {k: v.clone() for k, v in state.items()}
    bad[V3][3, 4] = float("nan")
    save_file(bad, tmp_path / "nan.safetensors")
    checkpoint = ic.read_checkpoint(tmp_path / "nan.safetensors")
    ic.infer_spec(checkpoint)
    assert torch.isfinite(checkpoint.ip_adapter["3.to_k_ip.weight"]).all()
    with pytest.raises(ic.AdapterError, match=r"NaN"):
        checkpoint.ip_adapter["3.to_v_ip.weight"]


def test_the_fixture_itself_loads(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "ok.safetensors")
    ic.load_adapter(tmp_path / "ok.safetensors")
    assert load_file(tmp_path / "ok.safetensors").keys() == state.keys()
