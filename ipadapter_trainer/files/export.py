"""`ipadapter export`: the newest weights of a training -> one file for every host, under a name that hosts know."""

from __future__ import annotations

from pathlib import Path

import torch

from .convert import Written, write_checked
from .opening import open_adapter


def export(source: Path, out: Path, *, dtype: torch.dtype | None = torch.float16, force: bool = False) -> Written:
    """Export a training's output folder (its newest checkpoint), one checkpoint folder or an adapter file.

    `out` is a file (.safetensors or .bin), or a folder, in which the file gets its published name, such as
    ip-adapter-plus_sd15.safetensors. The file is read back with ipadapter_core and with diffusers before it appears.

    Raises as `convert` does.
    """
    return write_checked(open_adapter(source), source, out, dtype=dtype, force=force)
