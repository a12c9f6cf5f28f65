"""What a user of the nodes meets first, checked without ComfyUI: help pages, translations, example workflows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NODES = json.loads((ROOT / "tests" / "comfy" / "schema.snapshot.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TWINS = ROOT / "tests" / "workflows"
HEADINGS = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)
# Types that come over a wire.
NO_WIDGET = {"MODEL", "CLIP_VISION", "IMAGE", "MASK", "IP_ADAPTER_MODEL", "IMAGE_PROMPT"}


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_is_complete(node):
    """Every input, output and choice stands in it, in a table or in a sentence; no other input does."""
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {NODES[node]['display_name']}\n")
    inputs, outputs = NODES[node]["inputs"], [name for _, name in NODES[node]["outputs"]]
    tables = page.split("\n## ")[0]
    named = {name for cell in HEADINGS.findall(tables) for name in re.findall(r"`([^`]+)`", cell)}
    assert named == {*inputs, *outputs}
    for name, described in inputs.items():
        if name != "picture":  # the pictures speak for themselves
            assert [c for c in described.get("choices", []) if f"`{c}`" not in page] == []


def test_no_help_page_is_left_over():
    assert {file.stem for file in (ROOT / "web" / "docs").glob("*.md")} == set(NODES)


def test_the_translation_has_every_name():
    """tests/comfy compares the texts themselves."""
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(english) == set(NODES)
    for node, described in NODES.items():
        assert list(english[node]["inputs"]) == list(described["inputs"])
        assert [item["name"] for item in english[node]["outputs"].values()] == [n for _, n in described["outputs"]]
        assert all(item["tooltip"] for part in ("inputs", "outputs") for item in english[node][part].values())


def test_there_is_nothing_else_among_the_workflows():
    """ComfyUI lists every JSON of the folder as a template, with the picture of the same name."""
    assert len(WORKFLOWS) == 4
    expected = {file.name for file in WORKFLOWS} | {f"{file.stem}.jpg" for file in WORKFLOWS}
    assert {file.name for file in (ROOT / "example_workflows").iterdir()} == expected


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
class TestWorkflow:
    def test_links_join_what_they_say(self, file):
        graph = json.loads(file.read_text(encoding="utf-8"))
        assert graph["version"] == 0.4
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert graph["links"]
        for number, source, slot, target, place, kind in graph["links"]:
            output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
            assert number in output["links"] and entry["link"] == number
            assert output["type"] == entry["type"] == kind

    def test_our_nodes_are_as_they_are_today(self, file):
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] not in NODES:
                continue
            schema = NODES[node["type"]]
            assert node["properties"]["cnr_id"] == "ip-adapter-kit"
            assert [[out["type"], out["name"]] for out in node["outputs"]] == schema["outputs"]
            widgets = [described for described in schema["inputs"].values() if described["type"] not in NO_WIDGET]
            assert len(node["widgets_values"]) == len(widgets)
            for value, described in zip(node["widgets_values"], widgets, strict=True):
                if described["type"] == "FLOAT":
                    assert described["min"] <= value <= described["max"]
                elif "models" not in node["properties"]:
                    assert value in described["choices"]

    def test_files_to_download_are_named(self, file):
        """Each file that a loader asks for has an address on huggingface.co, the only ones ComfyUI offers to fetch."""
        folders = {"CheckpointLoaderSimple": "checkpoints", "LoadIPAdapter": "ipadapter"}
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            models = node["properties"].get("models", [])
            assert bool(models) == (node["type"] in folders)
            for model in models:
                assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(".safetensors")
            if models:
                names = [model["name"] for model in models if model["directory"] == folders[node["type"]]]
                assert names == node["widgets_values"][:1]
            if node["type"] == "LoadIPAdapter":
                assert {model["directory"] for model in models} == {"ipadapter", "clip_vision"}

    def test_it_has_a_thumbnail(self, file):
        picture = file.with_suffix(".jpg")
        assert picture.stat().st_size < 200_000
        with Image.open(picture) as thumbnail:
            assert min(thumbnail.size) >= 256

    def test_its_twin_for_scripts_is_the_same_graph(self, file):
        """The API format that ComfyUI's frontend made of it, and that tests/comfy run."""
        nodes = {str(node["id"]): node for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]}
        twin = json.loads((TWINS / f"{file.stem}.api.json").read_text(encoding="utf-8"))
        assert set(twin) == {number for number, node in nodes.items() if node["type"] != "MarkdownNote"}
        for number, node in twin.items():
            assert node["class_type"] == nodes[number]["type"]
            if node["class_type"] in NODES:
                literals = [value for value in node["inputs"].values() if not isinstance(value, list)]
                assert literals == nodes[number]["widgets_values"]
