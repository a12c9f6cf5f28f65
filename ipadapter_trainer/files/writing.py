"""Adapter files as hosts read them: .safetensors with a header, or the original's .bin; whole or not at all."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipadapter_core import (
    METADATA_BASE_FAMILY,
    METADATA_DIM_HEAD,
    METADATA_KIND,
    METADATA_NUM_TOKENS,
    METADATA_SHORTCUT,
    AdapterError,
    IPAdapter,
    adapter_from_checkpoint,
    checkpoint_from_state,
    export_state,
    save_adapter,
    spec_metadata,
)

from ..errors import ExportError, VerificationError
from ..runtime.disk import disk_errors
from .file_names import SUFFIXES

if TYPE_CHECKING:
    from .verify import Verification

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# What a file says of its tensors; an older file's claim must not win over what is written.
_OF_THE_TENSORS = (METADATA_KIND, METADATA_BASE_FAMILY, METADATA_SHORTCUT, METADATA_NUM_TOKENS, METADATA_DIM_HEAD)


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
    format: .safetensors, or .bin (`{"image_proj": {...}, "ip_adapter": {...}}`), which has no place for metadata.

    The file appears under its name by one rename, and only after `verify_export` has passed (`verify`; its part
    `with_diffusers` may be left out).

    Raises ExportError for another suffix or values that `dtype` cannot hold; AdapterError for weights that are not
    finite; VerificationError; DiskError.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path}: the suffix {path.suffix!r} is unknown. Use {' or '.join(SUFFIXES)}.")
    rounded = cast_adapter(adapter, dtype)
    metadata = {key: value for key, value in (metadata or {}).items() if key not in _OF_THE_TENSORS}
    # A folder beside the target, so that loaders meet the real name and the rename stays on one file system.
    folder = path.parent / f".{path.name}-{secrets.token_hex(4)}.tmp"
    file = folder / path.name
    try:
        with disk_errors(path, need=_size(rounded)):
            folder.mkdir(parents=True)
            _write(file, rounded, metadata)
        result = None
        if verify:
            from .verify import verify_export

            result = replace(verify_export(file, adapter, metadata, with_diffusers=with_diffusers), file=path)
        with disk_errors(path):
            file.replace(path)
        return result
    except (AdapterError, VerificationError) as error:
        raise type(error)(str(error).replace(str(file), str(path))) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cast_adapter(adapter: IPAdapter, dtype: torch.dtype | None) -> IPAdapter:
    """The adapter on the CPU with its weights rounded to `dtype`; the given one stays as it is.

    Raises ExportError that names the first tensor whose values `dtype` cannot hold.
    """
    if dtype is None:
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
    shortcut = getattr(adapter.projector, "shortcut", None)
    checkpoint = checkpoint_from_state(state, metadata=spec_metadata(adapter.spec))
    return adapter_from_checkpoint(checkpoint, shortcut=shortcut)


def _size(adapter: IPAdapter) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in export_state(adapter).values())


def _write(file: Path, adapter: IPAdapter, metadata: dict[str, str]) -> None:
    if file.suffix == ".safetensors":
        save_adapter(file, adapter, metadata)
    else:
        _write_bin(file, adapter)


def _write_bin(file: Path, adapter: IPAdapter) -> None:
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in export_state(adapter).items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{file}: not saved, {key} holds NaN or infinity. The training diverged.")
        part, _, name = key.partition(".")
        # A clone: a view would take the whole storage behind it into the file.
        parts[part][name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    with file.open("wb") as stream:
        torch.save(parts, stream)
        stream.flush()
        os.fsync(stream.fileno())
