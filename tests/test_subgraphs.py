"""The blueprints in subgraphs/, which ComfyUI offers in its node search, checked without ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODES = json.loads((ROOT / "tests" / "comfy" / "schema.snapshot.json").read_text(encoding="utf-8"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
WIDGETS = {"COMBO", "INT", "FLOAT", "BOOLEAN", "STRING"}
INPUTS, OUTPUTS = -10, -20  # ids of the two ends of a subgraph
FILES = {"LoadIPAdapter": "ipadapter"}


def read(file):
    blueprint = json.loads(file.read_text(encoding="utf-8"))
    (graph,) = blueprint["definitions"]["subgraphs"]
    return blueprint, graph


def test_there_is_nothing_else_in_the_folder():
    """ComfyUI offers every JSON file of it, under the file's name."""
    assert len(BLUEPRINTS) == 3
    assert set((ROOT / "subgraphs").iterdir()) == set(BLUEPRINTS)
    ids = [read(file)[1]["id"] for file in BLUEPRINTS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
class TestBlueprint:
    def test_it_is_one_node_with_its_subgraph(self, file):
        blueprint, graph = read(file)
        (node,) = blueprint["nodes"]
        assert blueprint["version"] == 0.4 and blueprint["links"] == []
        assert node["type"] == graph["id"] and node["mode"] == 0
        assert node["title"] == graph["name"] == file.stem
        assert graph["category"] == "image prompt"
        assert 40 < len(graph["description"]) < 250
        assert "ipadapter" in blueprint["extra"]["BlueprintSearchAliases"]

    def test_its_inputs_and_outputs_are_named(self, file):
        blueprint, graph = read(file)
        (node,) = blueprint["nodes"]
        for side in ("inputs", "outputs"):
            inside, outside = graph[side], node[side]
            assert [(slot["name"], slot["type"]) for slot in outside] == [(s["name"], s["type"]) for s in inside]
            shown = [slot.get("label", slot["name"]) for slot in inside]
            assert [slot.get("label", slot["name"]) for slot in outside] == shown
            assert len(set(shown)) == len(shown)
            for slot in inside:
                name = slot.get("label", slot["name"])
                assert name and not name[-1].isdigit() and "_" not in name, "a name for people"
        assert [slot["type"] for slot in graph["inputs"]][:2] == ["MODEL", "IMAGE"]
        assert [slot["name"] for slot in graph["outputs"]] == ["model"]
        assert all(slot["link"] is None for slot in node["inputs"])

    def test_its_wires_join_what_they_say(self, file):
        _, graph = read(file)
        nodes = {node["id"]: node for node in graph["nodes"]}
        seen = []
        for link in graph["links"]:
            number, kind = link["id"], link["type"]
            start, end = link["origin_id"], link["target_id"]
            if start == INPUTS:
                source = graph["inputs"][link["origin_slot"]]
                assert number in source["linkIds"]
            else:
                source = nodes[start]["outputs"][link["origin_slot"]]
                assert number in source["links"]
            if end == OUTPUTS:
                target = graph["outputs"][link["target_slot"]]
                assert number in target["linkIds"]
            else:
                target = nodes[end]["inputs"][link["target_slot"]]
                assert target["link"] == number
            assert source["type"] == target["type"] == kind
            seen.append(number)
        assert len(set(seen)) == len(seen)
        for slot in (*graph["inputs"], *graph["outputs"]):
            assert slot["linkIds"] and set(slot["linkIds"]) <= set(seen)
        for node in graph["nodes"]:
            entries = {entry["name"]: entry for entry in node["inputs"]}
            for name, described in NODES[node["type"]]["inputs"].items():
                if not described["optional"] and described["type"] not in WIDGETS:
                    assert entries[name]["link"] is not None

    def test_its_nodes_are_as_they_are_today(self, file):
        _, graph = read(file)
        assert len(graph["nodes"]) >= 2
        for node in graph["nodes"]:
            schema = NODES[node["type"]]
            assert node["properties"]["cnr_id"] == "ip-adapter-kit" and node["mode"] == 0
            assert [[out["type"], out["name"]] for out in node["outputs"]] == schema["outputs"]
            widgets = {name: entry for name, entry in schema["inputs"].items() if entry["type"] in WIDGETS}
            values = node["widgets_values_named"]
            assert list(values.values()) == node["widgets_values"]
            assert set(values) == set(widgets)
            for entry in node["inputs"]:
                assert entry["type"] == schema["inputs"][entry["name"]]["type"]
            for name, described in widgets.items():
                if described["type"] in ("FLOAT", "INT"):
                    assert described["min"] <= values[name] <= described["max"]
                elif described["type"] == "COMBO" and described["choices"]:
                    assert values[name] in described["choices"]

    def test_its_widgets_begin_with_the_values_of_their_nodes(self, file):
        """The node outside holds values of its own, in the order of the inputs that have a widget."""
        blueprint, graph = read(file)
        (node,) = blueprint["nodes"]
        nodes = {inner["id"]: inner for inner in graph["nodes"]}
        links = {link["id"]: link for link in graph["links"]}
        inner = []
        for slot in graph["inputs"]:
            (link,) = (links[number] for number in slot["linkIds"])
            entry = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            if entry.get("widget"):
                inner.append(nodes[link["target_id"]]["widgets_values_named"][entry["widget"]["name"]])
        assert inner and node["widgets_values"] == inner

    def test_files_to_download_are_named(self, file):
        _, graph = read(file)
        for node in graph["nodes"]:
            models = node["properties"].get("models", [])
            assert bool(models) == (node["type"] in FILES)
            assert all(model["url"].startswith("https://huggingface.co/") for model in models)
            if models:
                names = [model["name"] for model in models if model["directory"] == FILES[node["type"]]]
                assert names == node["widgets_values"][:1]
