"""The texts for translation are those of the nodes; UPDATE_SNAPSHOT=1 writes them (see test_schema)."""

from __future__ import annotations

import json
import os
from pathlib import Path

LOCALE = Path(__file__).resolve().parents[2] / "locales" / "en" / "nodeDefs.json"


def texts(cls):
    schema = cls.define_schema()
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs},
        "outputs": {
            str(index): {"name": item.display_name, "tooltip": item.tooltip}
            for index, item in enumerate(schema.outputs)
        },
    }


def test_english_is_what_the_nodes_say(pack):
    expected = {cls.__name__: texts(cls) for cls in pack.classes}
    if os.environ.get("UPDATE_SNAPSHOT"):
        LOCALE.write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
        return
    assert json.loads(LOCALE.read_text(encoding="utf-8")) == expected
