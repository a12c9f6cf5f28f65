"""How the example workflows and blueprints look when they are opened: from their JSON, as the frontend draws it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
TITLE, SLOT = 30, 20  # pixels: the title bar above a node's position, the distance of two slots
MARGIN = 4  # pixels that a wire may touch
each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
each = pytest.mark.parametrize("file", [*WORKFLOWS, *BLUEPRINTS], ids=lambda file: file.stem)


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def drawn(file: Path) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The nodes and wires of a workflow, or of the subgraph of a blueprint with its two ends as nodes."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    if file not in BLUEPRINTS:
        return workflow["nodes"], workflow["links"]
    (graph,) = workflow["definitions"]["subgraphs"]
    ends = []
    for name, side in (("inputNode", "outputs"), ("outputNode", "inputs")):
        left, top, width, height = graph[name]["bounding"]
        slots = graph["inputs" if side == "outputs" else "outputs"]  # what comes in leaves the node of the inputs
        ends.append(
            {
                "id": graph[name]["id"],
                "type": name,
                "pos": [left, top + TITLE],
                "size": [width, height - TITLE],
                side: [{"at": slot["pos"]} for slot in slots],
            }
        )
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [*graph["nodes"], *ends], [[link[key] for key in keys] for link in graph["links"]]


def box_of(node: dict[str, Any], margin: float = 0.0) -> Box:
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x + margin, y - TITLE + margin, x + width - margin, y + height - margin)


def slot(node: dict[str, Any], side: str, index: int) -> tuple[float, float]:
    """Where a wire begins ("outputs") or ends ("inputs"); inputs of widgets take no slot of their own."""
    if "at" in node[side][index]:  # an end of a subgraph
        return tuple(node[side][index]["at"])
    if side == "inputs":
        index = [i for i, entry in enumerate(node["inputs"]) if not entry.get("widget")].index(index)
    x = node["pos"][0] + (node["size"][0] if side == "outputs" else 0)
    return x, node["pos"][1] + (index + 0.7) * SLOT


def wire(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of the curve that the frontend draws."""
    pull = 0.25 * ((start[0] - end[0]) ** 2 + (start[1] - end[1]) ** 2) ** 0.5
    points = [start, (start[0] + pull, start[1]), (end[0] - pull, end[1]), end]
    curve = []
    for step in range(201):
        t = step / 200
        weights = [(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t * t, t**3]
        curve.append(tuple(sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in (0, 1)))
    return curve


@each
def test_no_node_lies_on_another(file: Path) -> None:
    nodes, _ = drawn(file)
    for one, other in itertools.combinations(nodes, 2):
        assert not box_of(one).overlaps(box_of(other)), (one["type"], other["type"])


@each
def test_no_wire_runs_behind_a_node(file: Path) -> None:
    listed, links = drawn(file)
    nodes = {node["id"]: node for node in listed}
    for _, source, output, target, index, _ in links:
        if nodes[target]["inputs"][index].get("widget"):
            continue
        curve = wire(slot(nodes[source], "outputs", output), slot(nodes[target], "inputs", index))
        assert curve[0][0] < curve[-1][0], f"{nodes[source]['type']} is right of {nodes[target]['type']}"
        for id, node in nodes.items():
            if id in (source, target):
                continue
            box = box_of(node, MARGIN)
            behind = any(box.left < x < box.right and box.top < y < box.bottom for x, y in curve)
            assert not behind, f"{nodes[source]['type']} -> {nodes[target]['type']} behind {node['type']}"


@each_workflow
def test_texts_are_titled(file: Path) -> None:
    """Which of two text boxes is the negative one is seen before it is read."""
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    texts = [node for node in nodes if node["type"] == "CLIPTextEncode"]
    titles = [node.get("title", "") for node in texts]
    assert all(title for title in titles) and len(set(titles)) == len(titles), titles
    assert any("ositive" in title for title in titles) and any("egative" in title for title in titles), titles


@each_workflow
def test_an_image_and_a_note_go_with_it(file: Path) -> None:
    assert file.with_suffix(".jpg").is_file()
    workflow = json.loads(file.read_text(encoding="utf-8"))
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])
