"""The old pack's example workflows, read from its checkout: they open, and those for SD1.5 and SDXL run.

Models, texts, the VAE and nodes of third packs are replaced; the old nodes and the samplers are real.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PEER = os.environ.get("IPADAPTER_PLUS_PATH", "")
EXAMPLES = sorted((Path(PEER) / "examples").glob("*.json")) if PEER else []
# Of other packs, and of the frontend itself.
OTHERS = {"Note", "PrimitiveNode"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
# For Kolors, or for CosXL Edit, whose UNet takes more channels.
OTHER_MODELS = {"IPAdapter_FaceIDv2_Kolors", "ipadapter_kolors", "ipadapter_cosxl_edit"}
each_example = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)


def is_widget(kind, options):
    plain = isinstance(kind, list) or kind in {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
    return plain and not options.get("forceInput")


def widgets_of(types, values):
    """The saved values by the names of the widgets, and the values that are left."""
    left, named = list(values or []), {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in types.get(group, {}).items():
            options = rest[0] if rest else {}
            if is_widget(kind, options) and left:
                named[name] = left.pop(0)
                if left and isinstance(left[0], str) and left[0] in CONTROLS:
                    left.pop(0)
    return named, left


def defaults_of(types):
    """What the frontend gives to widgets without a saved value."""
    found = {}
    for name, (kind, *rest) in types.get("required", {}).items():
        options = rest[0] if rest else {}
        if is_widget(kind, options):
            found[name] = options.get("default", kind[0] if isinstance(kind, list) and kind else None)
    return found


def test_there_are_examples(peer_folder):
    assert len(EXAMPLES) == 21


@each_example
def test_it_opens(old, file):
    """Every widget of the old nodes gets the value that was saved for it, and every wire ends in an input."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    seen = 0
    for node in workflow["nodes"]:
        if node["type"] not in old:
            assert "IPAdapter" not in node["type"], node["type"]
            continue
        seen += 1
        info = old[node["type"]].GET_NODE_INFO_V1()
        types = info["input"]
        described = {**types.get("required", {}), **types.get("optional", {})}
        named, left = widgets_of(types, node.get("widgets_values"))
        widgets = [name for name, (kind, *rest) in described.items() if is_widget(kind, rest[0] if rest else {})]
        # Files of earlier versions end before the widgets that came later; those get their defaults.
        assert list(named) == widgets[: len(named)] and not left, node["type"]
        for name, value in named.items():
            kind = described[name][0]
            if isinstance(kind, list) and name != "ipadapter_file":
                assert value in kind, (node["type"], name)
            elif kind == "FLOAT":
                assert isinstance(value, int | float), (node["type"], name)
        for entry in node.get("inputs", []):
            assert entry["name"] in described, (node["type"], entry["name"])
            if not isinstance(described[entry["name"]][0], list):
                assert entry["type"] == described[entry["name"]][0]
        outputs = [output["type"] for output in node.get("outputs", [])]
        assert outputs == list(info["output"][: len(outputs)])
    assert seen


@pytest.fixture(scope="session")
def core_nodes(comfyui):
    """ComfyUI's own nodes, those of comfy_extras included."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


class Graph:
    """Runs a workflow of the frontend's format in this process, node by node."""

    def __init__(self, workflow, nodes, replaced):
        self.by_id = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.nodes, self.replaced, self.made = nodes, replaced, {}

    def run(self):
        return [self.outputs(node) for node in self.by_id.values() if node["type"] in ("KSampler", "VAEDecode")]

    def outputs(self, node):
        if node["id"] not in self.made:
            self.made[node["id"]] = self.execute(node)
        return self.made[node["id"]]

    def execute(self, node):
        wires = {}
        for entry in node.get("inputs", []):
            if entry.get("link") is not None:
                _, source, slot, *_ = self.links[entry["link"]]
                wires[entry["name"]] = self.outputs(self.by_id[source])[slot]
        if node["type"] in self.replaced:
            return self.replaced[node["type"]](node.get("widgets_values"), wires)
        cls = self.nodes[node["type"]]
        named, _ = widgets_of(cls.INPUT_TYPES(), node.get("widgets_values"))
        named = {**defaults_of(cls.INPUT_TYPES()), **named}
        if node["type"] == "KSampler":
            named["steps"] = 2
        result = getattr(cls(), cls.FUNCTION)(**{**named, **wires})
        return result if isinstance(result, tuple) else result.result


@pytest.fixture
def replaced(models, vision):
    """Stand-ins for what needs large files or other packs."""

    def checkpoint(values, _):
        return models["sdxl" if "sdxl" in values[0] else "sd15"], values[0], values[0]

    def text(values, wires):
        width = 2048 if "sdxl" in wires["clip"] else 768
        generator = torch.Generator().manual_seed(len(values[0]))
        return ([[torch.randn(1, 7, width, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]],)

    def load_image(values, _):
        generator = torch.Generator().manual_seed(len(values[0]))
        return torch.rand(1, 72, 90, 3, generator=generator), torch.rand(1, 72, 90, generator=generator)

    return {
        "CheckpointLoaderSimple": checkpoint,
        "CLIPTextEncode": text,
        "CLIPVisionLoader": lambda *_: (vision,),
        "LoadImage": load_image,
        "EmptyLatentImage": lambda values, _: ({"samples": torch.zeros(values[2], 4, 16, 8)},),
        "VAEDecode": lambda _, wires: (wires["samples"]["samples"],),
        "PrimitiveNode": lambda values, _: (values[0],),
        "SimpleMath+": lambda *_: (64, 64.0),
        "ImageCASharpening+": lambda _, wires: (wires["image"],),
        "MaskFromRGBCMYBW+": lambda _, wires: tuple(wires["image"][..., index % 3] for index in range(8)),
        "ConditioningCombineMultiple+": lambda _, wires: ([item for cond in wires.values() for item in cond],),
    }


@pytest.fixture
def face_images(face_models, comfyui, folders):
    """Images with a face, for the small face models that are put where both packs look, and a LoRA."""
    import folder_paths

    face_models.write_pack(Path(folder_paths.models_dir) / "insightface" / "models" / "buffalo_l")
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_q"
    parts = {f"{name}.lora_up.weight": torch.ones(32, 2), f"{name}.lora_down.weight": torch.ones(2, 32)}
    save_file(parts, folders / "loras" / "ip-adapter-faceid-plusv2_sd15_lora.safetensors")
    image = face_models.draw_faces((32, 9, 8))[None]
    return lambda *_: (image, torch.zeros(1, 640, 640))


@each_example
def test_it_runs(old, core_nodes, put, write_encoder, replaced, file, request):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    types = {node["type"] for node in workflow["nodes"]}
    if file.stem in OTHER_MODELS:
        pytest.skip("for a model that has no tiny one here")
    family = "sdxl" if any("sdxl" in str(node.get("widgets_values")) for node in workflow["nodes"]) else "sd15"
    if "IPAdapterUnifiedLoaderFaceID" in types:
        replaced["LoadImage"] = request.getfixturevalue("face_images")
        if family == "sdxl":
            put("sdxl", "portrait", "ip-adapter-faceid-portrait_sdxl")
        else:
            put("sd15", "faceid-plus", "ip-adapter-faceid-plusv2_sd15", lora_rank=8)
            put("sd15", "full", "ip-adapter-full-face_sd15")
    else:
        name = {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"}[family]
        put(family, "plus", name)
    write_encoder("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    results = Graph(workflow, {**core_nodes, **old}, replaced).run()
    assert results
    for latent, *_ in results:
        samples = latent["samples"] if isinstance(latent, dict) else latent
        assert torch.isfinite(samples).all() and float(samples.std()) > 0
