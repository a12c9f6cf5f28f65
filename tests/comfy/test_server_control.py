"""Layer Weights, Weight Schedule, Regions and Attention Map in graphs that a started ComfyUI runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

GRAPH = Path(__file__).parent / "demo.api.json"


@pytest.fixture
def graph():
    return json.loads(GRAPH.read_text())


def run(server, graph):
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def pixels(server, entry, node="9"):
    image = entry["outputs"][node]["images"][0]
    query = f"filename={image['filename']}&type={image['type']}&subfolder={image['subfolder']}"
    return Image.open(io.BytesIO(server.read(f"/view?{query}"))).convert("RGB").tobytes()


def test_a_bypassed_encode_node(server, graph):
    """The frontend leaves out the node and the input that came from it."""
    del graph["3"], graph["4"]["inputs"]["image_prompt"]
    without = pixels(server, run(server, graph))
    graph["7"]["inputs"]["model"] = ["1", 0]
    assert pixels(server, run(server, graph)) == without


def test_all_of_them(server, graph):
    plain = pixels(server, run(server, graph))
    graph |= {
        "20": {"class_type": "LayerWeights", "inputs": {"family": "SD1.5", "composition": 0.2, "layers": ""}},
        "21": {
            "class_type": "WeightSchedule",
            "inputs": {"over": "steps", "weights": "1, 0.5", "timing": "ease in"},
        },
        "22": {"class_type": "RecordAttentionMap", "inputs": {"model": ["4", 0]}},
        "23": {"class_type": "ImagePromptAttentionMap", "inputs": {"record": ["22", 1], "image": ["8", 0]}},
    }
    graph["4"]["inputs"] |= {"layer_weights": ["20", 0], "weight_schedule": ["21", 0]}
    graph["7"]["inputs"]["model"] = ["22", 0]
    entry = run(server, graph)
    assert pixels(server, entry) != plain
    drawn = pixels(server, entry, "23")
    assert len(entry["outputs"]["23"]["images"]) == 4

    graph["23"]["inputs"] |= {"layers": "style", "start_at_step": 1, "end_at_step": 3, "scale": "absolute"}
    entry = run(server, graph)
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert {"4", "7", "8", "22"} <= set(cached), "another map needs no sampling"
    assert pixels(server, entry, "23") != drawn

    graph["7"]["inputs"]["seed"] = 1
    again = pixels(server, run(server, graph), "23")
    assert again != drawn, "a new run has a new record"


def test_regions(server, graph):
    del graph["4"]
    left = {"image": ["2", 0], "channel": "red"}
    graph |= {
        "30": {"class_type": "ImageToMask", "inputs": left},
        "31": {"class_type": "InvertMask", "inputs": {"mask": ["30", 0]}},
        "32": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "crab"}},
        "33": {
            "class_type": "ImagePromptRegions",
            "inputs": {
                "model": ["1", 0],
                "ip_adapter": ["1", 4],
                "positive": ["5", 0],
                "mask_1": ["30", 0],
                "image_prompt_1": ["3", 0],
                "weight_1": 0.8,
                "mask_2": ["31", 0],
                "positive_2": ["32", 0],
            },
        },
    }
    graph["7"]["inputs"] |= {"model": ["33", 0], "positive": ["33", 1]}
    both = pixels(server, run(server, graph))
    del graph["33"]["inputs"]["positive_2"], graph["33"]["inputs"]["mask_2"]
    assert pixels(server, run(server, graph)) != both
