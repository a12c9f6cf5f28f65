"""The example workflows, help pages and texts in a started ComfyUI: they are served, they fit its nodes, they run."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NODES = sorted(file.stem for file in (ROOT / "web" / "docs").glob("*.md"))
NO_NODE = {"MarkdownNote"}  # the frontend's own
FILES = {"CheckpointLoaderSimple": {"ckpt_name"}, "LoadIPAdapter": {"ipadapter_name", "clip_vision_name"}}
each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def inputs_of(info):
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def is_widget(described):
    """As the frontend decides it: lists of choices and plain values, unless a wire is asked for."""
    kind, *options = described
    plain = isinstance(kind, list) or kind in {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
    return plain and not (options and options[0].get("forceInput"))


def choices_of(described):
    kind, *options = described
    return kind if isinstance(kind, list) else (options[0].get("options", []) if options else [])


def test_the_templates_are_served(server):
    assert sorted(server.get("/api/workflow_templates")["a-folder"]) == [file.stem for file in WORKFLOWS]
    for file in WORKFLOWS:
        for name in (file.name, f"{file.stem}.jpg"):
            assert (
                server.read(f"/api/workflow_templates/a-folder/{urllib.parse.quote(name)}")
                == file.with_name(name).read_bytes()
            )


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_is_served(server, node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_bytes()
    assert server.read(f"/extensions/a-folder/docs/{node}.md") == page


def test_the_texts_are_served_in_every_language(server):
    served = server.get("/api/i18n")
    for folder in (ROOT / "locales").iterdir():
        texts = served[folder.name]["nodeDefs"]
        assert {node: texts[node] for node in NODES} == read_json(folder / "nodeDefs.json")


@each_workflow
def test_the_graph_fits_the_nodes_of_this_comfyui(server, file):
    """Every node exists, its widgets are those that the values were saved for, and its wires end where they say."""
    for node in read_json(file)["nodes"]:
        if node["type"] in NO_NODE:
            continue
        info = server.get(f"/object_info/{node['type']}")[node["type"]]
        described = inputs_of(info)
        widgets = {name: entry for name, entry in described.items() if is_widget(entry)}
        values = node.get("widgets_values_named", {})
        extra = set(values) - set(widgets)
        assert set(widgets) <= set(values)
        # What the frontend adds by itself: after a seed, and the button of Load Image.
        assert extra <= ({"control_after_generate"} if "seed" in widgets else {"upload"})
        for name, entry in widgets.items():
            if choices_of(entry) and name not in FILES.get(node["type"], ()):
                assert values[name] in choices_of(entry)
        for entry in node["inputs"]:
            assert entry["name"] in described or entry["name"] in extra
            if entry["link"] is not None:
                assert entry["type"] == described[entry["name"]][0]
        for output, kind in zip(node["outputs"], info["output"], strict=False):
            assert output["type"] == kind
        assert len(node["outputs"]) <= len(info["output"])


@each_workflow
def test_the_graph_runs(server, file):
    """Those that need no download, as they are; the others stop at the files that are not there, and at no other."""
    graph = read_json(ROOT / "tests" / "workflows" / f"{file.stem}.api.json")
    files = {node["inputs"][name] for node in graph.values() for name in FILES.get(node["class_type"], ())} - {"auto"}
    if files:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.run(graph)
        errors = json.loads(refused.value.read())["node_errors"]
        stopped = {graph[number]["class_type"]: str(node["errors"]) for number, node in errors.items()}
        # ComfyUI 0.3.64 leaves the choices of newer nodes, such as ours, to the nodes themselves.
        assert {"CheckpointLoaderSimple"} <= set(stopped) <= set(FILES)
        for kind, message in stopped.items():
            assert "Value not in list" in message and any(name in message for name in files), kind
        return
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    previews = [number for number, node in graph.items() if node["class_type"] == "PreviewImage"]
    assert previews
    (batch,) = (node["inputs"]["batch_size"] for node in graph.values() if node["class_type"] == "EmptyLatentImage")
    for number in previews:
        assert len(entry["outputs"][number]["images"]) == batch
