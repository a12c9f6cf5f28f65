"""`ipadapter convert`: an adapter in any layout -> the published one, as .safetensors or .bin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ipadapter_core import AdapterSpec, IPAdapter, shortcut_hint

from ..errors import ExportError
from .file_names import SUFFIXES, name_problem, published_name
from .opening import adapter_files, open_adapter
from .verify import Verification
from .writing import write_adapter


@dataclass(frozen=True)
class Written:
    """What was written, what the check of it found, and what the user should know of its name."""

    file: Path
    verification: Verification
    warnings: tuple[str, ...]


def convert(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shortcut: bool | None = None,
    force: bool = False,
) -> Written:
    """Write the adapter in `source` (a file of any layout, or a folder, see `opening.adapter_files`) to `out` in the
    published layout, verified. `dtype` None keeps that of each tensor; `shortcut` says that a faceid-plus adapter is
    v2 (True) or v1 (False). When `out` is a folder, the file gets its published name.

    Raises ExportError when `out` exists and not `force`, or is the source itself; else as `write_adapter` does.
    """
    adapter = open_adapter(source, shortcut)
    return write_checked(adapter, source, out, dtype=dtype, force=force)


def write_checked(
    adapter: IPAdapter, source: Path, out: Path, *, dtype: torch.dtype | None = None, force: bool = False
) -> Written:
    """Write and verify an adapter that came from `source`; see `convert`."""
    file = target_file(out, adapter.spec)
    _check_target(source, file, force)
    verification = write_adapter(file, adapter, adapter.metadata, dtype=dtype)
    assert verification is not None
    return Written(file, verification, _warnings(source, file, adapter.spec))


def target_file(out: Path, spec: AdapterSpec) -> Path:
    """`out`, or the published name in it when `out` is a folder or has no suffix.

    Raises ExportError for a suffix that is neither .safetensors nor .bin.
    """
    if out.is_dir() or not out.suffix:
        return out / published_name(spec)
    if out.suffix not in SUFFIXES:
        raise ExportError(f"{out}: the suffix {out.suffix!r} is unknown. Use {' or '.join(SUFFIXES)}, or a folder.")
    return out


def _check_target(source: Path, file: Path, force: bool) -> None:
    if not file.exists():
        return
    if any(file.samefile(part) for part in adapter_files(source)):
        raise ExportError(f"{file} is the file that is read. Choose another name for the result.")
    if file.is_dir():
        raise ExportError(f"{file} is a folder. Choose another name for the result.")
    if not force:
        raise ExportError(f"{file} exists already. Choose another name, or add --force to replace it.")


def _warnings(source: Path, file: Path, spec: AdapterSpec) -> tuple[str, ...]:
    found: list[str] = []
    if spec.kind == "faceid-plus" and spec.shortcut is None:
        hint = shortcut_hint(source)
        guess = "" if hint is None else f" The name {source.name} suggests v{1 + hint}."
        found.append(f"The file does not say whether it is v1 or v2.{guess} Add --version v1 or v2 to write it down.")
    problem = name_problem(file.name, spec)
    return (*found, problem) if problem else tuple(found)
