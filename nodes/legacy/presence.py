"""Whether ComfyUI_IPAdapter_plus is installed: by its files, since its folder may have any name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comfy.cli_args import args

_FILES = ("__init__.py", "IPAdapterPlus.py", "CrossAttentionPatch.py")


def find_old_pack(folders: Iterable[str | Path]) -> Path | None:
    """The first copy in these custom_nodes folders that ComfyUI loads; None without one."""
    for folder in map(Path, folders):
        if not folder.is_dir():
            continue
        for pack in sorted(folder.iterdir()):
            if _is_loaded(pack.name) and all((pack / name).is_file() for name in _FILES):
                return pack
    return None


def _is_loaded(name: str) -> bool:
    """As in ComfyUI's init_external_custom_nodes: neither disabled by its name nor left out on the command line."""
    left_out = args.disable_all_custom_nodes and name not in args.whitelist_custom_nodes
    return not name.endswith(".disabled") and not left_out
