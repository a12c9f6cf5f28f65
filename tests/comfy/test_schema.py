"""What a workflow file relies on: a snapshot of every node, and the rules by which it may change.

A workflow stores input names, the order of widgets and the order of outputs. So: nothing is renamed, removed,
reordered or narrowed without a new major version; new inputs come last, are optional, and default to the old result.
`UPDATE_SNAPSHOT=1 pytest tests/comfy/test_schema.py` writes the snapshot anew.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).parent / "schema.snapshot.json"
FILES = {
    "ipadapter_name": [],
    "clip_vision_name": ["auto"],
    "image_prompt_name": [],
    "adapter": ["the emoji adapter", "the emoji adapter (base)"],
}  # lists of files are not part of the promise


def describe(cls):
    """Inputs in the order of the widgets, with type, default and choices; outputs in order."""
    info = cls.GET_NODE_INFO_V1()
    inputs = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            choices = FILES.get(name, options.get("options", kind if isinstance(kind, list) else None))
            inputs[name] = {
                "type": "COMBO" if isinstance(kind, list) else kind,
                "optional": group == "optional",
                **{key: options[key] for key in ("default", "min", "max", "step") if key in options},
                **({"choices": choices} if choices is not None else {}),
            }
    return {
        "display_name": info["display_name"],
        "category": info["category"],
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output"], info["output_name"], strict=True)],
    }


@pytest.fixture(scope="module")
def schema(pack):
    return {cls.__name__: describe(cls) for cls in pack.classes}


@pytest.fixture(scope="module")
def snapshot():
    """As it was before this run."""
    return json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}


def test_the_snapshot_is_current(schema, snapshot):
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
        return
    assert schema == snapshot, "Set UPDATE_SNAPSHOT=1 to accept the change; test_nothing_breaks says if it breaks any."


def test_nothing_breaks(schema, snapshot):
    """Old workflows load and give the same images."""
    for node, old in snapshot.items():
        assert node in schema, f"{node} is gone"
        new = schema[node]
        names, before = list(new["inputs"]), list(old["inputs"])
        assert names[: len(before)] == before, f"{node}: inputs were renamed, removed or reordered"
        for name in names[len(before) :]:
            assert new["inputs"][name]["optional"], f"{node}.{name}: a new input must be optional"
        for name in before:
            was, now = old["inputs"][name], new["inputs"][name]
            assert was["type"] == now["type"] and was.get("default") == now.get("default"), f"{node}.{name}"
            assert set(was.get("choices", [])) <= set(now.get("choices", [])), f"{node}.{name}: choices were removed"
            assert was.get("min", 0) >= now.get("min", 0) and was.get("max", 0) <= now.get("max", 0), f"{node}.{name}"
        assert new["outputs"][: len(old["outputs"])] == old["outputs"], f"{node}: outputs were changed"


def test_every_node_says_what_it_does(pack):
    for cls in pack.classes:
        schema = cls.define_schema()
        assert schema.category == "image prompt"
        assert schema.node_id == cls.__name__
        assert " " in schema.display_name
        assert schema.description
        for item in [*schema.inputs, *schema.outputs]:
            assert item.tooltip, f"{cls.__name__}.{item.id or item.display_name} has no tooltip"


def test_search_aliases_where_comfyui_knows_them(pack):
    for cls in pack.classes:
        aliases = getattr(cls.define_schema(), "search_aliases", None)
        assert aliases is None or "image prompt" in aliases


def test_the_nodes_hold_to_the_registrys_rules():
    """No network, subprocess, environment, pickle or free path; ASCII; files that fit in the head."""
    nodes = Path(__file__).resolve().parents[2] / "nodes"
    forbidden = r"subprocess|os\.system|os\.environ|torch\.load|pickle|requests|urllib|huggingface_hub|eval\(|exec\("
    files = sorted(nodes.glob("*.py"))
    assert files
    for file in files:
        text = file.read_text(encoding="ascii")
        assert len(text.splitlines()) <= 300, file.name
        for line in text.splitlines():
            found = re.search(forbidden, line)
            assert found is None or line.strip().startswith(('"', "#")) or "model.eval()" in line, (
                f"{file.name}: {line}"
            )
