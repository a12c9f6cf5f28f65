"""The blueprints in a started ComfyUI, and what their subgraphs do with small models, beside the same nodes by hand."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
BLUEPRINTS = {file.stem: file for file in sorted((ROOT / "subgraphs").glob("*.json"))}
INPUTS, OUTPUTS = -10, -20  # ids of the two ends of a subgraph


def test_they_are_served_where_comfyui_knows_blueprints(server, comfyui):
    if not (comfyui / "app" / "subgraph_manager.py").is_file():
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.get("/global_subgraphs")
        assert set(server.get("/object_info/ImagePrompt")) == {"ImagePrompt"}  # and the pack is there as always
        return
    entries = server.get("/global_subgraphs").items()
    served = {entry["name"]: id for id, entry in entries if entry["info"]["node_pack"] == "custom_nodes.a-folder"}
    assert set(served) == set(BLUEPRINTS)
    for name, id in served.items():
        assert server.get(f"/global_subgraphs/{id}")["data"] == BLUEPRINTS[name].read_text(encoding="utf-8")


def run(pack, name, **given):
    """The model that a blueprint gives, with its inputs by the names that it shows ("_" for a space)."""
    blueprint = json.loads(BLUEPRINTS[name].read_text(encoding="utf-8"))
    (graph,) = blueprint["definitions"]["subgraphs"]
    (outside,) = blueprint["nodes"]
    shown = [slot["label"].replace(" ", "_") if "label" in slot else slot["name"] for slot in graph["inputs"]]
    widgets = [name for name, slot in zip(shown, outside["inputs"], strict=True) if slot.get("widget")]
    values = {**dict(zip(widgets, outside["widgets_values"], strict=True)), **given}
    assert set(values) == set(shown)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link["id"]: link for link in graph["links"]}
    results = {}

    def value(number):
        origin, slot = links[number]["origin_id"], links[number]["origin_slot"]
        if origin == INPUTS:
            return values[shown[slot]]
        if origin not in results:
            node = nodes[origin]
            inputs = dict(node["widgets_values_named"])
            inputs |= {entry["name"]: value(entry["link"]) for entry in node["inputs"] if entry["link"] is not None}
            results[origin] = getattr(pack, node["type"]).execute(**inputs).args
        return results[origin][slot]

    (number,) = (link["id"] for link in graph["links"] if link["target_id"] == OUTPUTS)
    return value(number)


def assert_same(world, model, expected):
    made = world.sample(model)
    assert not torch.equal(made, world.base)
    torch.testing.assert_close(made, world.sample(expected), atol=0, rtol=0)


@pytest.fixture
def images():
    return torch.rand(2, 1, 40, 48, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def save(pack, folders, narrow, sound_state):
    """The model folders with an encoder, and a function that puts an adapter there and gives what the loader makes."""
    state = {key: tensor * 0.1 if tensor.is_floating_point() else tensor for key, tensor in sound_state.items()}
    save_file(state, folders["clip_vision"] / "encoder.safetensors")

    def save(adapter, name="a.safetensors"):
        pack.core.save_adapter(folders["ipadapter"] / name, adapter)
        return pack.LoadIPAdapter.execute(name).args

    return save


def test_image_prompt(pack, world, save, images):
    adapter, encoder = save(world.new_adapter(world.model, kind="plus").adapter)
    model = run(pack, "Image Prompt (load, encode, apply)", model=world.model, image=images[0], adapter="a.safetensors")
    prompt = pack.EncodeImagePrompt.execute(adapter, encoder, images[0]).args[0]
    assert_same(world, model, world.apply(world.model, adapter, prompt, weight=0.7))


def test_style_and_composition(pack, world, save, images):
    save(world.new_adapter(world.model, kind="plus").adapter)
    style, composition = images
    name = "Style and Composition Prompt"
    given = {"model": world.model, "style_image": style, "composition_image": composition}
    one = pack.ImagePrompt.execute(world.model, style, 1.0, "style").args[0]
    assert_same(world, run(pack, name, **given), pack.ImagePrompt.execute(one, composition, 1.0, "composition").args[0])
    half = pack.ImagePrompt.execute(one, composition, 0.5, "composition").args[0]
    assert_same(world, run(pack, name, **given, composition_weight=0.5), half)


@pytest.mark.parametrize(("kind", "file"), [("faceid", "a.safetensors"), ("faceid-plus", "plusv2.safetensors")])
def test_face(pack, world, save, face_models, vision, tmp_path, monkeypatch, kind, file):
    import comfy.ops
    import folder_paths

    root = tmp_path / "insightface"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(root)], set()))
    face_models.write_pack(root / "models" / "buffalo_l")
    sites = pack.core.cross_attention_sites(world.model.get_model_object("diffusion_model"))
    options = {"image_dim": vision["hidden_size"], "depth": 1, "dim_head": 16} if kind == "faceid-plus" else {}
    widths = [site.dim for site in sites]
    spec = pack.core.new_spec(kind, widths, sites[0].cross_attention_dim, lora_rank=3, **options)
    made = pack.core.IPAdapter(spec, operations=comfy.ops.manual_cast)
    world.randomise(made, 42, scale=0.15)
    adapter, clip_vision = save(made, file)
    assert (clip_vision is None) == (kind == "faceid")
    image = face_models.draw_faces((32, 10, 9))[None]
    given = {"model": world.model, "image": image, "adapter": file, "LoRA_strength": 0.8}
    analysis = pack.face_analysis.load_face_analysis("buffalo_l")
    prompt = pack.EncodeFacePrompt.execute(adapter, analysis, image, clip_vision).args[0]
    expected = world.apply(world.model, adapter, prompt, weight=1.0, lora_strength=0.8)
    assert_same(world, run(pack, "Face Prompt (FaceID)", **given), expected)
