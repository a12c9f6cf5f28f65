"""A started ComfyUI server: the pack is loaded from custom_nodes, and the demo graph runs through POST /prompt."""

from __future__ import annotations

import dataclasses
import io
import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NODES = sorted(file.stem for file in (Path(__file__).resolve().parents[2] / "web" / "docs").glob("*.md"))
GRAPH = Path(__file__).parent / "demo.api.json"


def test_the_nodes_are_there(server):
    for node in NODES:
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
    from comfy_api.latest import io as comfy_io

    if "has_intermediate_output" in {field.name for field in dataclasses.fields(comfy_io.Schema)}:
        assert len(entry["outputs"]["3"]["images"]) == 1  # the preview is there after a reload of the page


def test_an_error_reaches_the_user(server):
    """A graph from a script may name what no combo offers; some versions refuse it, others ask the node."""
    graph = json.loads(GRAPH.read_text())
    graph["3"]["inputs"]["crop"] = "in the middle"
    try:
        message = json.dumps(server.run(graph)["status"])
    except urllib.error.HTTPError as error:
        message = error.read().decode()
    assert "in the middle" in message and "center" in message


def test_former_weight_types_pass_and_others_are_named(server):
    """The list that users see has the names of today only."""
    info = server.get("/object_info/ApplyIPAdapter")["ApplyIPAdapter"]["input"]["optional"]["weight_type"]
    listed = info[0] if isinstance(info[0], list) else info[1]["options"]
    assert "style transfer" in listed and not any("SDXL" in choice for choice in listed)
    graph = json.loads(GRAPH.read_text())
    apply = next(node for node in graph.values() if node["class_type"] == "ApplyIPAdapter")
    images = {}
    for name in ("style transfer", "style transfer (SDXL)"):
        apply["inputs"]["weight_type"] = name
        entry = server.run(graph)
        assert entry["status"]["status_str"] == "success", entry["status"]
        image = entry["outputs"]["9"]["images"][0]
        file = io.BytesIO(server.read(f"/view?filename={image['filename']}&type={image['type']}"))
        images[name] = Image.open(file).convert("RGB").tobytes()  # the file also holds the graph
    assert images["style transfer"] == images["style transfer (SDXL)"]
    apply["inputs"]["weight_type"] = "swirl"
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.run(graph)
    assert "Unknown weight type 'swirl'. Use one of: linear, ease in" in refused.value.read().decode()


def test_another_image_loads_no_model_again(server):
    """And with Image Prompt on the demo model: two nodes, no file, the choice in the history."""
    graph = {
        "1": {"class_type": "LoadIPAdapterDemo", "inputs": {}},
        "2": {"class_type": "DemoImage", "inputs": {"image": "crab_twemoji"}},
        "3": {"class_type": "ImagePrompt", "inputs": {"model": ["1", 0], "image": ["2", 0], "use_for": "subject"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "7": json.loads(GRAPH.read_text())["7"],
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
    }
    graph["3"]["inputs"]["weight"] = 0.7
    graph["7"]["inputs"]["model"] = ["3", 0]
    first = server.run(graph)
    assert first["status"]["status_str"] == "success", first["status"]
    assert first["outputs"]["3"]["text"][0].startswith("the emoji adapter")
    assert len(first["outputs"]["3"]["images"]) == 1 and len(first["outputs"]["2"]["images"]) == 1
    graph["2"]["inputs"]["image"] = "pineapple_fluent"
    second = server.run(graph)
    cached = next(data["nodes"] for kind, data in second["status"]["messages"] if kind == "execution_cached")
    assert "1" in cached and not {"2", "3", "7"} & set(cached)
    third = server.run(graph)
    cached = next(data["nodes"] for kind, data in third["status"]["messages"] if kind == "execution_cached")
    assert {"1", "2", "3", "7"} <= set(cached)


def test_an_attention_map_belongs_to_the_run_of_its_image(caching_server):
    """Also when ComfyUI took the image from its cache, after another seed without a map."""
    graph = json.loads(GRAPH.read_text())
    graph["70"] = {"class_type": "RecordAttentionMap", "inputs": {"model": graph["7"]["inputs"]["model"]}}
    graph["7"]["inputs"]["model"] = ["70", 0]
    inputs = {"record": ["70", 1], "image": ["8", 0], "opacity": 1.0}
    node = {"class_type": "ImagePromptAttentionMap", "inputs": inputs}

    def run(seed, opacity=None):
        """The map of the first image, or None without the node."""
        graph["7"]["inputs"]["seed"] = seed
        made = graph if opacity is None else {**graph, "71": {**node, "inputs": {**inputs, "opacity": opacity}}}
        entry = caching_server.run(made)
        assert entry["status"]["status_str"] == "success", entry["status"]
        if opacity is None:
            return None
        image = entry["outputs"]["71"]["images"][0]
        place = f"/view?filename={image['filename']}&type={image['type']}&subfolder={image['subfolder']}"
        pixels = np.asarray(Image.open(io.BytesIO(caching_server.read(place))).convert("RGB"))
        return pixels.astype(int)

    first = run(101, 1.0)
    run(102)
    again = run(101, 0.999)
    assert abs(first - again).max() <= 2
    assert abs(first - run(102, 1.0)).max() > 20


def test_save_combine_and_load(server):
    """An image prompt is saved in one graph, and listed, loaded and combined in the next."""
    graph = json.loads(GRAPH.read_text())
    apply = next(node for node in graph.values() if node["class_type"] == "ApplyIPAdapter")
    encoded = apply["inputs"]["image_prompt"]
    graph["90"] = {"class_type": "SaveImagePrompt", "inputs": {"image_prompt": encoded, "filename_prefix": "demo"}}
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"]["90"]["text"] == ["output/image_prompts/demo_00001_.safetensors"]
    info = server.get("/object_info/LoadImagePrompt")["LoadImagePrompt"]["input"]["required"]["image_prompt_name"]
    (name,) = info[0] if isinstance(info[0], list) else info[1]["options"]
    assert name == "image_prompts/demo_00001_.safetensors [output]"
    del graph["90"]
    graph["91"] = {"class_type": "LoadImagePrompt", "inputs": {"image_prompt_name": name}}
    prompts = {"image_prompt_1": encoded, "image_prompt_2": ["91", 0], "combine": "average", "weight_2": 0.5}
    graph["92"] = {"class_type": "CombineImagePrompts", "inputs": prompts}
    apply["inputs"]["image_prompt"] = ["92", 0]
    encode = next(node for node in graph.values() if node["class_type"] == "EncodeImagePrompt")
    noise = {"noise": "shuffle", "strength": 0.5, "blur": 3, "seed": 1, "image": encode["inputs"]["image"], "size": 64}
    graph["93"] = {"class_type": "NoiseImage", "inputs": noise}
    encode["inputs"]["image_negative"] = ["93", 0]
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert len(entry["outputs"]["9"]["images"]) == 4 and len(entry["outputs"]["93"]["images"]) == 1
