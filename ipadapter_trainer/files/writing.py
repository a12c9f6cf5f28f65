"""Adapter files as hosts read them: .safetensors with metadata, or the original's .bin; written atomically."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ipadapter_core import AdapterError, IPAdapter, export_state, save_adapter
from ipadapter_core.adapter import state_to_save
from ipadapter_core.metadata import OF_THE_TENSORS

from ..errors import ExportError, VerificationError
from ..runtime.disk import disk_errors
from .opening import cast_adapter
from .published import SUFFIXES
from .verify import Verification, verify_export

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def dtype_of(name: str | None) -> torch.dtype | None:
    """ "float16" -> torch.float16; None stays None. Raises ExportError for another name."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ExportError(f"dtype {name!r} is unknown. Use one of: {', '.join(DTYPES)}.")
    return DTYPES[name]


def write_adapter(
    path: Path,
    adapter: IPAdapter,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    with_diffusers: bool = True,
) -> Verification | None:
    """Write an adapter in the published layout, in `dtype` (None: each tensor in its own). The suffix decides the
    format: .safetensors, or .bin (`{"image_proj": {...}, "ip_adapter": {...}}`), which holds no metadata.

    The file appears under its name by one rename, after `verify_export` has passed (if `verify`, and with diffusers if
    `with_diffusers`).

    Raises ExportError for another suffix or values that `dtype` cannot hold; AdapterError for weights that are not
    finite, or matrices of zeros; VerificationError; DiskError.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path}: the suffix {path.suffix!r} is unknown. Use {' or '.join(SUFFIXES)}.")
    rounded = adapter if dtype is None else cast_adapter(adapter, dtype)
    metadata = {key: value for key, value in (metadata or {}).items() if key not in OF_THE_TENSORS}
    size = sum(tensor.numel() * tensor.element_size() for tensor in export_state(rounded).values())
    # A folder next to the target, so that loaders get the real file name and the rename stays on one file system.
    folder = path.parent / f".{path.name}-{secrets.token_hex(4)}.tmp"
    file = folder / path.name
    try:
        with disk_errors(path, need=size):
            folder.mkdir(parents=True)
            _write(file, rounded, metadata)
        result = None
        if verify:
            result = replace(verify_export(file, adapter, metadata, with_diffusers=with_diffusers), file=path)
        with disk_errors(path):
            file.replace(path)
        return result
    except (AdapterError, VerificationError) as error:
        raise type(error)(str(error).replace(str(file), str(path))) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(file: Path, adapter: IPAdapter, metadata: dict[str, str]) -> None:
    if file.suffix == ".safetensors":
        save_adapter(file, adapter, metadata)
        return
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state_to_save(file, adapter).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor.clone()  # torch.save writes the whole storage of a view
    with file.open("wb") as stream:
        torch.save(parts, stream)
        stream.flush()
        os.fsync(stream.fileno())
