"""Whether ComfyUI_IPAdapter_plus itself is installed: by its files, because the name of a folder says nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_FILES = ("IPAdapterPlus.py", "CrossAttentionPatch.py")


def find_old_pack(folders: Iterable[str | Path]) -> Path | None:
    """The first copy in these custom_nodes folders that ComfyUI would load; None without one."""
    for folder in map(Path, folders):
        if not folder.is_dir():
            continue
        for pack in sorted(folder.iterdir()):
            disabled = pack.name.endswith(".disabled")
            if not disabled and (pack / "__init__.py").is_file() and all((pack / name).is_file() for name in _FILES):
                return pack
    return None
