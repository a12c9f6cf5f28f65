"""The graphs that krita-ai-diffusion and SwarmUI build by the old names, through a started ComfyUI.

Read at krita-ai-diffusion 0217cd2 (comfy_client.py, comfy_workflow.py) and SwarmUI 062407c (ComfyUIBackendExtension.cs,
WorkflowGeneratorSteps.cs).
"""

from __future__ import annotations

import shutil
import urllib.error
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE = "emoji.safetensors"


@pytest.fixture(scope="module")
def host(server):
    """The server with the bundled adapter as a file of models/ipadapter."""
    folder = server.log.parent / "models" / "ipadapter"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "assets" / "emoji" / "adapter.safetensors", folder / FILE)
    yield server
    (folder / FILE).unlink()  # other tests of this server find no adapter files


def run(host, graph):
    try:
        return host.run(graph)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


def required(server, node):
    return server.get(f"/object_info/{node}")[node]["input"]["required"]


def test_krita_finds_what_it_requires(host):
    """Both nodes, and the files as the first entry of a required input."""
    nodes = host.get("/object_info")
    assert {"IPAdapterModelLoader", "IPAdapter"} <= set(nodes)
    assert FILE in nodes["IPAdapterModelLoader"]["input"]["required"]["ipadapter_file"][0]


def test_swarmui_finds_what_it_reads(host):
    """It takes index 0 of weight_type without looking whether that is a list."""
    presets = required(host, "IPAdapterUnifiedLoader")["preset"][0]
    assert "PLUS (high strength)" in presets and all(isinstance(name, str) for name in presets)
    assert FILE in required(host, "IPAdapterModelLoader")["ipadapter_file"][0]
    weight_types = required(host, "IPAdapter")["weight_type"][0]
    assert weight_types == ["standard", "prompt is more important", "style transfer"]
    assert "FACEID PLUS V2" in required(host, "IPAdapterUnifiedLoaderFaceID")["preset"][0]


def around(model, steps=2):
    """The rest of a graph: from a model to an image."""
    return {
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "positive": ["text", 0],
                "negative": ["text", 0],
                "latent_image": ["latent", 0],
                "seed": 0,
                "steps": steps,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["demo", 2]}},
        "out": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "host"}},
    }


def loaders():
    return {
        "demo": {"class_type": "LoadIPAdapterDemo", "inputs": {}},
        "image": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
        "adapter": {"class_type": "IPAdapterModelLoader", "inputs": {"ipadapter_file": FILE}},
    }


def krita(weight_type, images):
    """Control layers "reference", "style" or "composition": an embed for each, of its own weight, and no neg_embed."""
    graph, embeds = loaders(), {}
    graph["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.8, "width": 64, "height": 64}}
    for index in range(images):
        graph[f"encode{index}"] = {
            "class_type": "IPAdapterEncoder",
            "inputs": {
                "image": ["image", 0],
                "weight": 0.5 + 0.2 * index,
                "ipadapter": ["adapter", 0],
                "clip_vision": ["demo", 3],
            },
        }
        embeds[f"embed{index + 1}"] = [f"encode{index}", 0]
    graph["combine"] = {"class_type": "IPAdapterCombineEmbeds", "inputs": {"method": "concat", **embeds}}
    graph["apply"] = {
        "class_type": "IPAdapterEmbeds",
        "inputs": {
            "model": ["demo", 0],
            "ipadapter": ["adapter", 0],
            "pos_embed": ["combine", 0],
            "clip_vision": ["demo", 3],
            "weight": 1.0,
            "weight_type": weight_type,
            "embeds_scaling": "V only",
            "start_at": 0.0,
            "end_at": 0.8,
            "attn_mask": ["mask", 0],
        },
    }
    return {**graph, **around(["apply", 0])}


@pytest.mark.parametrize(("weight_type", "images"), [("linear", 5), ("style transfer", 1), ("composition", 2)])
def test_krita_runs(host, weight_type, images):
    entry = run(host, krita(weight_type, images))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"]["out"]["images"]


def test_swarmui_runs_with_a_model_file(host):
    graph = loaders()
    graph["apply"] = {
        "class_type": "IPAdapterAdvanced",
        "inputs": {
            "model": ["demo", 0],
            "ipadapter": ["adapter", 0],
            "image": ["image", 0],
            "weight": 1,
            "start_at": 0.0,
            "end_at": 1.0,
            "weight_type": "ease out",
            "combine_embeds": "concat",
            "embeds_scaling": "V only",
            "clip_vision": ["demo", 3],
        },
    }
    entry = run(host, {**graph, **around(["apply", 0])})
    assert entry["status"]["status_str"] == "success", entry["status"]


def test_swarmui_with_a_preset_is_told_what_is_missing(host):
    """The graph is accepted; with the bundled model, for which no preset is made, it stops with a sentence."""
    graph = {"demo": {"class_type": "LoadIPAdapterDemo", "inputs": {}}}
    graph["image"] = {"class_type": "LoadImage", "inputs": {"image": "reference.png"}}
    inputs = {"model": ["demo", 0], "preset": "FACEID", "lora_strength": 0.6, "provider": "CPU"}
    graph["loader"] = {"class_type": "IPAdapterUnifiedLoaderFaceID", "inputs": inputs}
    graph["apply"] = {
        "class_type": "IPAdapter",
        "inputs": {
            "model": ["loader", 0],
            "ipadapter": ["loader", 1],
            "image": ["image", 0],
            "weight": 1,
            "start_at": 0.0,
            "end_at": 1.0,
            "weight_type": "standard",
        },
    }
    entry = run(host, {**graph, **around(["apply", 0])})
    messages = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert "Preset 'FACEID' is for SD1.5 and SDXL models" in messages[0]["exception_message"]


def test_other_nodes_of_the_old_names_run(host):
    """Those whose outputs are lists of weights, images and masks, through ComfyUI's own executor."""
    graph = loaders()
    nodes = {
        "prep": ("PrepImageForClipVision", {"image": ["image", 0], "interpolation": "LANCZOS", "crop_position": "top"}),
        "noise": ("IPAdapterNoise", {"type": "fade", "strength": 0.5, "blur": 2, "image_optional": ["prep", 0]}),
        "weights": (
            "IPAdapterWeights",
            {
                "weights": "1.0, 0.0",
                "timing": "linear",
                "frames": 3,
                "start_frame": 0,
                "end_frame": 9999,
                "add_starting_frames": 0,
                "add_ending_frames": 0,
                "method": "full batch",
                "image": ["prep", 0],
            },
        ),
        "apply": (
            "IPAdapterBatch",
            {
                "model": ["demo", 0],
                "ipadapter": ["adapter", 0],
                "image": ["weights", 3],
                "weight": ["weights", 0],
                "weight_type": "linear",
                "start_at": 0.0,
                "end_at": 1.0,
                "embeds_scaling": "V only",
                "encode_batch_size": 2,
                "image_negative": ["noise", 0],
                "clip_vision": ["demo", 3],
            },
        ),
    }
    graph.update({key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()})
    graph["prep"]["inputs"]["sharpening"] = 0.1
    graph["saved"] = {"class_type": "IPAdapterSaveEmbeds", "inputs": {"embeds": ["e", 0], "filename_prefix": "e"}}
    encode = {"ipadapter": ["adapter", 0], "image": ["prep", 0], "weight": 1.0, "clip_vision": ["demo", 3]}
    graph["e"] = {"class_type": "IPAdapterEncoder", "inputs": encode}
    entry = run(host, {**graph, **around(["apply", 0])})
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert list((host.log.parent / "output").glob("e_*.ipadpt"))
