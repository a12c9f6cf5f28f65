"""What a user of the nodes meets first, checked without ComfyUI: help pages, translations, example workflows."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NODES = json.loads((ROOT / "tests" / "comfy" / "schema.snapshot.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TWINS = ROOT / "tests" / "workflows"
FIRST_CELLS = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)
# Types that come over a wire.
WIDGETS = {"COMBO", "INT", "FLOAT", "BOOLEAN", "STRING"}


def help_page(node):
    """The help page in parts, by heading; what comes before the first is under ""."""
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    first, *rest = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def first_cells(text):
    return [name for cell in FIRST_CELLS.findall(text) for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_is_complete(node):
    """A table of the inputs and one of the outputs, in the order in which ComfyUI shows them: required inputs before
    optional ones. Each combo has a table of its choices. A node without outputs needs no table of them.
    """
    parts, described = help_page(node), NODES[node]
    assert parts[""].startswith(f"# {described['display_name']}\n")
    assert first_cells(parts["Inputs"]) == list(described["inputs"])
    assert first_cells(parts.get("Outputs", "")) == [name for _, name in described["outputs"]]
    choices = {name: entry.get("choices", []) for name, entry in described["inputs"].items()}
    for name, listed in choices.items():
        if name in parts:
            assert sorted(first_cells(parts[name])) == sorted(listed)
        elif (node, name) != ("DemoImage", "image"):  # the images speak for themselves
            assert len(listed) <= 1 and all(f"`{choice}`" in parts["Inputs"] for choice in listed)


def said_in_code():
    """Every text of the nodes and of the core, with "..." for what is filled in."""
    texts = set()
    for file in [*(ROOT / "nodes").glob("*.py"), *(ROOT / "ipadapter_core").glob("*.py")]:
        for found in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(found, ast.JoinedStr):
                texts.add("".join(part.value if isinstance(part, ast.Constant) else "..." for part in found.values))
            elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                texts.add(found.value)
    return texts


def assert_in_code(messages):
    texts = said_in_code()
    assert messages
    for message in messages:
        fragments = [re.escape(fragment.strip()) for fragment in message.split("...")]
        assert any(re.search(".*".join(fragments), text) for text in texts), message


@pytest.mark.parametrize("node", NODES)
def test_the_messages_of_the_help_page_exist(node):
    assert_in_code(re.findall(r"\*\*(.+?)\*\*", help_page(node)["Messages"]))


def test_the_messages_of_the_error_table_exist():
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    table = page.split("| message | what to do |")[1].split("\n\n")[0]
    assert_in_code([cell.strip("`") for cell in first_cells(table)])


def test_no_help_page_is_left_over():
    assert {file.stem for file in (ROOT / "web" / "docs").glob("*.md")} == set(NODES)


def test_the_translation_has_every_name():
    """tests/comfy compares the texts themselves."""
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(english) == set(NODES)
    for node, described in NODES.items():
        # As the node defines them; ComfyUI, and so the snapshot, puts optional inputs behind the required ones.
        assert set(english[node]["inputs"]) == set(described["inputs"])
        shown = sorted(english[node]["inputs"], key=lambda name: described["inputs"][name]["optional"])
        assert shown == list(described["inputs"])
        assert [item["name"] for item in english[node]["outputs"].values()] == [n for _, n in described["outputs"]]
        assert all(item["tooltip"] for part in ("inputs", "outputs") for item in english[node][part].values())


def test_there_is_nothing_else_among_the_workflows():
    """ComfyUI lists every JSON of the folder as a template, with the image of the same name."""
    assert len(WORKFLOWS) == 7
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

    def test_it_is_the_same_for_everybody(self, file):
        """A fixed seed, and nothing of the page or the machine it was made on."""
        graph = json.loads(file.read_text(encoding="utf-8"))
        assert graph["extra"] == {}
        for node in graph["nodes"]:
            assert node.get("title", "a title") and node["mode"] == 0
            assert set(node["properties"]) <= {"Node name for S&R", "cnr_id", "ver", "models"}
            assert node.get("widgets_values", []) == list(node.get("widgets_values_named", {}).values())
            if node["type"] == "KSampler":
                assert node["widgets_values"][1] == "fixed"
        assert [node["type"] for node in graph["nodes"]].count("MarkdownNote") == 1

    def test_our_nodes_are_as_they_are_today(self, file):
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] not in NODES:
                continue
            schema = NODES[node["type"]]
            assert node["properties"]["cnr_id"] == "ip-adapter-kit"
            assert [[out["type"], out["name"]] for out in node["outputs"]] == schema["outputs"]
            widgets = {name: entry for name, entry in schema["inputs"].items() if entry["type"] in WIDGETS}
            values = node["widgets_values_named"]
            # What the frontend adds by itself after a seed.
            assert set(values) - ({"control_after_generate"} if "seed" in widgets else set()) == set(widgets)
            for name, described in widgets.items():
                if described["type"] in ("FLOAT", "INT"):
                    assert described["min"] <= values[name] <= described["max"]
                elif described["type"] == "COMBO" and "models" not in node["properties"]:
                    assert values[name] in described["choices"]

    def test_files_to_download_are_named(self, file):
        """Each file that a loader asks for has an address on huggingface.co, the only ones ComfyUI offers to fetch."""
        folders = {"CheckpointLoaderSimple": "checkpoints", "LoadIPAdapter": "ipadapter"}
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            models = node["properties"].get("models", [])
            assert bool(models) == (node["type"] in folders)
            for model in models:
                assert model["url"].startswith("https://huggingface.co/")
                assert model["url"].endswith((".safetensors", ".bin"))
            if models:
                names = [model["name"] for model in models if model["directory"] == folders[node["type"]]]
                assert names == node["widgets_values"][:1]
            if node["type"] == "LoadIPAdapter":
                encoders = [model["name"] for model in models if model["directory"] == "clip_vision"]
                assert encoders == [value for value in node["widgets_values"][1:2] if value != "auto"]

    def test_it_has_a_thumbnail(self, file):
        image = file.with_suffix(".jpg")
        assert image.stat().st_size < 200_000
        with Image.open(image) as thumbnail:
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
