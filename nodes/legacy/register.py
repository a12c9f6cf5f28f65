"""The old nodes, for ComfyUI, where the old pack is absent."""

from __future__ import annotations

import logging

import folder_paths
from comfy_api.latest import io

from . import (
    apply_nodes,
    embeds_nodes,
    faceid_nodes,
    frames_nodes,
    image_nodes,
    loader_nodes,
    precise_nodes,
    region_nodes,
    tiled_nodes,
)
from .presence import find_old_pack

_log = logging.getLogger("ip_adapter_kit")
_MODULES = (
    apply_nodes,
    precise_nodes,
    faceid_nodes,
    tiled_nodes,
    embeds_nodes,
    loader_nodes,
    image_nodes,
    frames_nodes,
    region_nodes,
)
OLD_NODES: list[type[io.ComfyNode]] = [node for module in _MODULES for node in module.NODES]


def old_nodes() -> list[type[io.ComfyNode]]:
    """All of them, or none where a copy of the old pack is installed: the last pack loaded would win each name."""
    found = find_old_pack(folder_paths.get_folder_paths("custom_nodes"))
    if found is None:
        return OLD_NODES
    _log.info(
        "IP-Adapter Kit: %s brings the old IPAdapter nodes. To run them on this pack, remove that folder.",
        found,
    )
    return []
