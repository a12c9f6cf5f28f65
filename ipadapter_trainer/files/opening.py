"""Where an adapter is in what the user names: a file, a training's output, a checkpoint, or what Accelerate saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ipadapter_core import (
    AdapterCheckpoint,
    IPAdapter,
    adapter_from_checkpoint,
    checkpoint_from_state,
    infer_spec,
    read_checkpoint,
    shortcut_hint,
)
from ipadapter_core.tensors import open_tensors

from ..errors import ExportError, TrainerError

ADAPTER_FILE = "adapter.safetensors"
EXPORTED = "ip-adapter"  # how published names begin
# What Accelerate's save_state and save_model write, and DeepSpeed's own file of the weights, in order of preference.
_WHOLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model/mp_rank_00_model_states.pt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the adapter named by `path`: the file itself; of a training's output its newest
    checkpoint, or its only export when there is none; of a checkpoint its adapter; of a folder that Accelerate wrote
    its model, which may be in shards.

    Raises ExportError, listing what was found, when a folder holds none of these.
    """
    if not path.is_dir():
        return (path,)  # read_checkpoint says what is wrong with it
    from .run_folder import checkpoint_folders

    checkpoints = checkpoint_folders(path)
    if checkpoints:
        return (checkpoints[-1] / ADAPTER_FILE,)
    for name in (ADAPTER_FILE, *_WHOLE):
        if (path / name).is_file():
            return (path / name,)
    for name in _INDEXES:
        if (path / name).is_file():
            return _shards(path / name)
    exported = sorted(path.glob(f"{EXPORTED}*.safetensors"))  # a training whose checkpoints were deleted
    if len(exported) == 1:
        return (exported[0],)
    found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in path.iterdir())[:8]) or "nothing"
    raise ExportError(
        f"{path}: no adapter in this folder (found: {found}). Expected {ADAPTER_FILE}, a checkpoint-<step> folder of a "
        f"training, or Accelerate's {_WHOLE[0]} or {_WHOLE[1]}."
    )


def open_checkpoint(path: Path) -> AdapterCheckpoint:
    """Open an adapter wherever it is, without reading its weights; see `adapter_files`.

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
    """Load an adapter wherever it is, frozen, on the CPU, in its own dtype; `shortcut` as for `load_adapter`.

    Raises AdapterError or ExportError.
    """
    checkpoint = open_checkpoint(path)
    # "format": "pt" is what the safetensors library writes of itself.
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != "format"}
    return adapter_from_checkpoint(replace(checkpoint, metadata=metadata), shortcut=shortcut)


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


def adapter_to_use(path: Path, shortcut: bool | None = None) -> IPAdapter:
    """An adapter in float32, from a file or the folder of a training. FaceID-plus files without metadata take their
    version from `shortcut`, else from their name.

    Raises AdapterError for what is no adapter, TrainerError when the version stays unknown.
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
