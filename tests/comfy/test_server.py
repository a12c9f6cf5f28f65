"""A started ComfyUI server: the pack is loaded from custom_nodes, and the demo graph runs through POST /prompt."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

GRAPH = Path(__file__).parent / "demo.api.json"


def test_the_nodes_are_there(server):
    for node in ("LoadIPAdapter", "EncodeImagePrompt", "ApplyIPAdapter", "LoadIPAdapterDemo"):
        info = server.get(f"/object_info/{node}")[node]
        assert info["category"] == "image prompt"
        assert info["python_module"] == "custom_nodes.a-folder"
    text = server.log.read_text()
    assert "Error while calling comfy_entrypoint" not in text
    failed = [line for line in text.splitlines() if "IMPORT FAILED" in line and "a-folder" in line]
    assert not failed and "a-folder" in text


def test_the_demo_graph_runs(server):
    graph = json.loads(GRAPH.read_text())
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert len(entry["outputs"]["9"]["images"]) == 4
    assert len(entry["outputs"]["3"]["images"]) == 1  # the preview of the crop


def test_the_second_run_is_cached(server):
    graph = json.loads(GRAPH.read_text())
    server.run(graph)
    graph["9"]["inputs"]["filename_prefix"] = "again"
    entry = server.run(graph)
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert {"1", "3", "4", "7"} <= set(cached)


def test_an_error_reaches_the_user(server):
    """A graph from a script may name what no combo offers; some versions refuse it, others ask the node."""
    graph = json.loads(GRAPH.read_text())
    graph["3"]["inputs"]["crop"] = "in the middle"
    try:
        message = json.dumps(server.run(graph)["status"])
    except urllib.error.HTTPError as error:
        message = error.read().decode()
    assert "in the middle" in message and "center" in message
