"""The adapter in a file, a training's output, a checkpoint, or a folder that Accelerate saved."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ipadapter_core import (
    AdapterCheckpoint,
    IPAdapter,
    adapter_from_checkpoint,
    checkpoint_from_state,
    export_state,
    infer_spec,
    read_checkpoint,
    shortcut_hint,
    spec_metadata,
)
from ipadapter_core.tensors import open_tensors

from ..errors import ExportError, TrainerError
from .published import PREFIX

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = "training.pt"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# What Accelerate's save_state and save_model write, and DeepSpeed's file of weights, in order of preference.
_WHOLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model/mp_rank_00_model_states.pt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints in a training's output folder, oldest first."""
    complete = (file.parent for file in output.glob(f"*/{STATE_FILE}") if (file.parent / ADAPTER_FILE).is_file())
    return sorted((folder for folder in complete if _CHECKPOINT.fullmatch(folder.name)), key=step_of)


def incomplete_checkpoints(output: Path) -> list[tuple[Path, str]]:
    """Checkpoints in a training's output folder that lack one of their two files, and its name; oldest first."""
    found: list[tuple[Path, str]] = []
    for folder in output.glob("checkpoint-*"):
        missing = [name for name in (ADAPTER_FILE, STATE_FILE) if not (folder / name).is_file()]
        if _CHECKPOINT.fullmatch(folder.name) and len(missing) == 1:
            found.append((folder, missing[0]))
    return sorted(found, key=lambda checkpoint: step_of(checkpoint[0]))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.rpartition("-")[2])


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the adapter at `path`: the file itself; in a training's output the newest checkpoint, or the
    only export when there is none; in a checkpoint its adapter; in a folder of Accelerate's its model, all shards.

    Raises ExportError, listing what was found, for a folder with none of these.
    """
    if not path.is_dir():
        return (path,)  # read_checkpoint raises when it is missing
    checkpoints = checkpoint_folders(path)
    if checkpoints:
        return (checkpoints[-1] / ADAPTER_FILE,)
    for name in (ADAPTER_FILE, *_WHOLE):
        if (path / name).is_file():
            return (path / name,)
    for name in _INDEXES:
        if (path / name).is_file():
            return _shards(path / name)
    exported = sorted(path.glob(f"{PREFIX}*.safetensors"))  # a training whose checkpoints were deleted
    if len(exported) == 1:
        return (exported[0],)
    found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in path.iterdir())[:8]) or "nothing"
    raise ExportError(
        f"{path}: no adapter in this folder (found: {found}). Expected {ADAPTER_FILE}, a checkpoint-<step> folder of a "
        f"training, or Accelerate's {_WHOLE[0]} or {_WHOLE[1]}."
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = tuple(index.parent / Path(name).name for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index}: not an index of shards ({error!r}). Copy the folder again.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"{len(missing)} of its {len(files)} shards are missing, the first is {missing[0]}" if files else "empty"
        raise ExportError(f"{index}: {what}. Copy the folder again, with all of them.")
    return files


def open_checkpoint(path: Path) -> AdapterCheckpoint:
    """Open the adapter at `path`, see `adapter_files`, without reading its weights.

    Raises AdapterError or ExportError.
    """
    files = adapter_files(path)
    if len(files) == 1:
        return read_checkpoint(files[0])
    tensors: dict[str, Tensor] = {}
    for file in files:
        opened = open_tensors(file, "a shard of a checkpoint")
        tensors.update({name: opened.read(name) for name in opened.infos})  # mapped from disk, not yet read
    return checkpoint_from_state(tensors, path=str(path))


def open_adapter(path: Path, shortcut: bool | None = None) -> IPAdapter:
    """Load the adapter at `path`, frozen, on the CPU, in its own dtype; `shortcut` as for `load_adapter`.

    Raises AdapterError or ExportError.
    """
    checkpoint = open_checkpoint(path)
    # The safetensors library adds "format": "pt".
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != "format"}
    return adapter_from_checkpoint(replace(checkpoint, metadata=metadata), shortcut=shortcut)


def adapter_to_use(path: Path, shortcut: bool | None = None) -> IPAdapter:
    """Load the adapter at `path` in float32. The version of a faceid-plus file without metadata is `shortcut`, else
    guessed from its name.

    Raises AdapterError for another file, TrainerError when the version stays unknown.
    """
    checkpoint = open_checkpoint(path)
    spec = infer_spec(checkpoint)
    if spec.kind == "faceid-plus" and spec.shortcut is None and shortcut is None:
        shortcut = shortcut_hint(checkpoint.path)
        if shortcut is None:
            raise TrainerError(
                f"{path}: FaceID-plus v1 or v2? Neither the file nor its name says. Set shortcut=true for v2, "
                "shortcut=false for v1."
            )
    return adapter_from_checkpoint(checkpoint, dtype=torch.float32, shortcut=shortcut)


def cast_adapter(adapter: IPAdapter, dtype: torch.dtype) -> IPAdapter:
    """The adapter on the CPU with its weights rounded to `dtype`: a frozen copy, or itself if it is like that already.

    Raises ExportError that names the first tensor whose values `dtype` cannot hold.
    """
    if all(p.dtype == dtype and p.device.type == "cpu" for p in adapter.parameters()):
        return adapter
    name, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    state: dict[str, Tensor] = {}
    for key, tensor in export_state(adapter).items():
        largest = tensor.detach().abs().max().item()
        if math.isfinite(largest) and largest > limit:
            raise ExportError(
                f"{key} has values up to {largest:.4g}, {name} holds at most {limit:.4g}. Use bfloat16 or float32."
            )
        state[key] = tensor.detach().to("cpu", dtype)
    checkpoint = checkpoint_from_state(state, metadata=spec_metadata(adapter.spec))
    return adapter_from_checkpoint(checkpoint, shortcut=getattr(adapter.projector, "shortcut", None))
