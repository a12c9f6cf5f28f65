"""ComfyUI's own loader, from a folder of any name, in this process."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import pytest

NODES = {file.stem for file in (Path(__file__).resolve().parents[2] / "web" / "docs").glob("*.md")}


def own(names):
    """Those that are not old names."""
    import nodes

    categories = {name: nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1()["category"] for name in names}
    assert set(categories.values()) == {"image prompt", "image prompt/old names"}
    return {name for name, category in categories.items() if category == "image prompt"}


def test_missing_bundled_files_take_no_node_away(comfyui, copy_pack, tmp_path, caplog):
    """Only the demo says that they are missing, and only when it runs."""
    import nodes

    folder = copy_pack(tmp_path / "without-assets")
    shutil.rmtree(folder / "assets")
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    added = set(nodes.NODE_CLASS_MAPPINGS) - before
    try:
        assert own(added) == NODES and "Error" not in caplog.text
        with pytest.raises(Exception, match="bundled emoji files are missing"):
            nodes.NODE_CLASS_MAPPINGS["LoadIPAdapterDemo"].execute()
        with pytest.raises(Exception, match="bundled emoji files are missing"):
            nodes.NODE_CLASS_MAPPINGS["DemoImage"].execute("crab_twemoji")
    finally:
        for name in added:
            del nodes.NODE_CLASS_MAPPINGS[name]


def test_any_folder_name(comfyui, copy_pack, tmp_path, caplog):
    import nodes

    folder = copy_pack(tmp_path / "my packs v1.2" / "some-folder")
    before = set(nodes.NODE_CLASS_MAPPINGS)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(nodes.load_custom_node(str(folder)))
    added = set(nodes.NODE_CLASS_MAPPINGS) - before
    try:
        assert own(added) == NODES
        assert "Error" not in caplog.text and "Cannot import" not in caplog.text
    finally:
        for name in added:
            del nodes.NODE_CLASS_MAPPINGS[name]
