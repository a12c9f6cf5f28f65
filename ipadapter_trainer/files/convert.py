"""`ipadapter export` and `ipadapter convert`: an adapter in any layout -> the published one, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ipadapter_core import AdapterSpec, shortcut_hint

from ..errors import ExportError
from .opening import adapter_files, open_adapter
from .published import SUFFIXES, name_problem, published_name
from .verify import Verification
from .writing import write_adapter


@dataclass(frozen=True)
class Written:
    """The written file, the result of its check, and warnings about its name."""

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
    published layout. It is read back with ipadapter_core and with diffusers before it appears under its name.

    `dtype` None keeps the dtype of each tensor; `shortcut` states that a faceid-plus adapter is v2 (True) or v1
    (False). In a folder `out`, or for a path without suffix, the file gets its published name.

    Raises ExportError when `out` exists and not `force`, or is the source itself; else as `write_adapter` does.
    """
    adapter = open_adapter(source, shortcut)
    if out.is_dir() or not out.suffix:
        out = out / published_name(adapter.spec)
    if out.suffix not in SUFFIXES:
        raise ExportError(f"{out}: the suffix {out.suffix!r} is unknown. Use {' or '.join(SUFFIXES)}, or a folder.")
    if out.exists():
        if any(out.samefile(file) for file in adapter_files(source)):
            raise ExportError(f"{out} is the file that is read. Choose another name for the result.")
        if out.is_dir():
            raise ExportError(f"{out} is a folder. Choose another name for the result.")
        if not force:
            raise ExportError(f"{out} exists already. Choose another name, or add --force to replace it.")
    verification = write_adapter(out, adapter, adapter.metadata, dtype=dtype)
    assert verification is not None
    return Written(out, verification, _warnings(source, out, adapter.spec))


def _warnings(source: Path, file: Path, spec: AdapterSpec) -> tuple[str, ...]:
    found: list[str] = []
    if spec.kind == "faceid-plus" and spec.shortcut is None:
        hint = shortcut_hint(source)
        guess = "" if hint is None else f" The name {source.name} suggests v{1 + hint}."
        found.append(f"The file does not say whether it is v1 or v2.{guess} Add --version v1 or v2 to write it down.")
    problem = name_problem(file.name, spec)
    return (*found, problem) if problem else tuple(found)
