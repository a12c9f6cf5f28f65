"""ComfyUI_IPAdapter_plus beside our nodes in one process, from the checkout that IPADAPTER_PLUS_PATH names."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

PEER = os.environ.get("IPADAPTER_PLUS_PATH", "")


@pytest.fixture(scope="session")
def peer_folder() -> Path:
    if not PEER:
        pytest.skip("IPADAPTER_PLUS_PATH is not set: this compares with a checkout of ComfyUI_IPAdapter_plus")
    return Path(PEER).resolve()


@pytest.fixture(scope="session")
def peer(peer_folder: Path, comfyui: Path) -> Any:
    """The old pack's node classes by id, from its own files."""
    spec = importlib.util.spec_from_file_location(
        "the_old_pack", peer_folder / "__init__.py", submodule_search_locations=[str(peer_folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_old_pack"] = module
    spec.loader.exec_module(module)
    return SimpleNamespace(nodes=module.NODE_CLASS_MAPPINGS, titles=module.NODE_DISPLAY_NAME_MAPPINGS)


@pytest.fixture(scope="session")
def old(pack: SimpleNamespace) -> dict[str, Any]:
    """Our node classes under the old ids."""
    return {cls.__name__: cls for cls in pack.register.OLD_NODES}


CONTEXTS = {"sd15": 768, "sdxl": 2048}
EMBEDS = 64  # of the tiny encoder: its image_embeds and its hidden states; a square, which the enhancer needs


@pytest.fixture(scope="session")
def new_vision(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes tiny CLIP vision models: 4 x 4 patches and the class token."""
    import comfy.clip_vision

    def make(side: int, width: int) -> Any:
        config = tmp_path_factory.mktemp(f"vision{side}") / "config.json"
        settings = {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "image_size": side,
            "patch_size": side // 4,
            "projection_dim": EMBEDS,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
        }
        config.write_text(json.dumps(settings))
        with torch.inference_mode():
            encoder = comfy.clip_vision.ClipVisionModel(str(config))
            world.randomise(encoder.model, seed=31, scale=0.2)
            for part in encoder.model.vision_model.encoder.layers.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight.mul_(0.5)
        return encoder

    return make


@pytest.fixture(scope="session")
def vision(new_vision: Callable[..., Any]) -> Any:
    """An encoder that sees 224 px, as the old pack expects."""
    return new_vision(224, EMBEDS)


@pytest.fixture(scope="session")
def models(world: SimpleNamespace) -> dict[str, Any]:
    """Tiny UNets in the shapes of SD1.5 and SDXL, with the real widths of the text."""
    with torch.inference_mode():
        return {
            family: world.new_model(family, context_dim=width, seed=index, width=32)
            for index, (family, width) in enumerate(CONTEXTS.items())
        }


@pytest.fixture(scope="session")
def adapter_file(pack: SimpleNamespace, models: dict[str, Any], comfyui: Path) -> Callable[..., str]:
    """Writes a random adapter of a kind for a family into models/ipadapter, once; returns the file's name."""
    import folder_paths

    own = Path(folder_paths.models_dir) / "ipadapter"

    def write(family: str, kind: str = "base", name: str = "", folder: Path = own, **options: Any) -> str:
        name = name or f"{kind}_{family}.safetensors"
        if (folder / name).exists():
            return name
        sites = pack.core.cross_attention_sites(models[family].get_model_object("diffusion_model"))
        if kind == "plus":
            options = {"resampler_dim": 1280 if family == "sdxl" else 768, **options}
        if kind in ("base", "plus", "full", "faceid-plus"):
            options = {"image_dim": EMBEDS, **options}
        if kind == "full":
            options = {"num_tokens": 17, **options}
        changes = options.pop("changes", {})
        spec = pack.core.new_spec(kind, [site.dim for site in sites], CONTEXTS[family], **options)
        spec = dataclasses.replace(spec, **changes)
        with torch.inference_mode():
            adapter = pack.core.IPAdapter(spec).half()
            generator = torch.Generator().manual_seed(len(name))
            for parameter in adapter.parameters():
                parameter.requires_grad_(False)
                fan = parameter.shape[1] if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator) / fan**0.5
                parameter.copy_(noise if parameter.ndim > 1 else noise * 0.1 + 0.9)
            for parameter in adapter.layers.parameters():
                parameter.mul_(4)
            spec = adapter.spec
            if kind == "faceid-plus":  # the published files do not say which version they are
                adapter.spec = dataclasses.replace(spec, shortcut=None)
                adapter.projector.shortcut = None
            pack.core.save_adapter(folder / name, adapter)
        folder_paths.filename_list_cache.clear()
        return name

    return write


@pytest.fixture(scope="session")
def run(world: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """Samples a model of a family, with its text."""

    def sample(model: Any, family: str, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        positive, negative = (
            [[torch.randn(1, 7, CONTEXTS[family], generator=generator), {"pooled_output": torch.zeros(1, 1280)}]]
            for _ in range(2)
        )
        return world.sample(model, **{"positive": positive, "negative": negative, "size": (16, 8), **options})

    return sample


@pytest.fixture
def folders(pack: SimpleNamespace, tmp_path: Path, monkeypatch: Any, vision: Any) -> Iterator[Path]:
    """Empty folders of models. ComfyUI knows encoders by the number of their layers, so the tiny one stands in."""
    import comfy.clip_vision
    import folder_paths

    for name in ("ipadapter", "clip_vision", "loras"):
        (tmp_path / name).mkdir()
        suffixes = {".safetensors", ".bin"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], suffixes))
    folder_paths.filename_list_cache.clear()
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: copy.copy(vision))
    yield tmp_path
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def write_encoder(folders: Path, vision: Any) -> Callable[[str], None]:
    """Puts the tiny encoder into models/clip_vision."""

    def write(name: str) -> None:
        state = {key: tensor.clone().contiguous() for key, tensor in vision.model.state_dict().items()}
        save_file(state, folders / "clip_vision" / name)

    return write


@pytest.fixture
def put(adapter_file: Callable[..., str], folders: Path, comfyui: Path) -> Callable[..., None]:
    """Puts an adapter of a kind under a name into models/ipadapter."""
    import folder_paths

    made = Path(folder_paths.models_dir) / "ipadapter"

    def write(family: str, kind: str, name: str, **options: Any) -> None:
        source = made / adapter_file(family, kind, folder=made, **options)
        (folders / "ipadapter" / f"{name}.safetensors").write_bytes(source.read_bytes())
        folder_paths.filename_list_cache.clear()

    return write


TOLERANCE = 1e-3  # of the scale of what the image prompt changes
FLOAT = 1e-5  # of the scale of the latents: rounding


class Draw:
    """Random inputs for a node, from the old pack's own INPUT_TYPES."""

    def __init__(self, seed, given):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.given = given

    def image(self):
        height, width = (self.random.choice([64, 80, 100, 150, 224, 300]) for _ in range(2))
        return torch.rand(self.random.choice([1, 1, 2, 3]), height, width, 3, generator=self.generator)

    def mask(self):
        height, width = (self.random.choice([64, 100, 128]) for _ in range(2))
        soft = torch.rand(self.random.choice([1, 1, 3]), 1, 4, 4, generator=self.generator)
        return torch.nn.functional.interpolate(soft, size=(height, width), mode="bilinear")[:, 0]

    def value(self, name, kind, options):
        if name in self.given:
            return self.given[name]
        if isinstance(kind, list):
            return self.random.choice(kind)
        if kind == "FLOAT":
            low, high = max(options["min"], -1.0), min(options["max"], 1.5)
            return round(self.random.uniform(low, high), 2)
        if kind == "INT":
            return self.random.randint(options["min"], min(options["max"], 4))
        if kind == "BOOLEAN":
            return self.random.random() < 0.5
        if kind == "STRING":
            return self.random.choice(["", "0:0.5, 3:1.0,5:-0.4", "1:1, 6:0.7, 4:1", "3:0.8,6:1"])
        if kind == "IMAGE":
            return self.image()
        if kind == "MASK":
            return self.mask()
        raise KeyError(kind)

    def inputs(self, types):
        made = {name: self.value(name, kind[0], (kind[1:] or [{}])[0]) for name, kind in types["required"].items()}
        for name, (kind, *_) in types.get("optional", {}).items():
            if name in self.given or self.random.random() < 0.4:
                made[name] = self.value(name, kind, {})
        if "start_at" in made and "start_at" not in self.given:
            start = self.random.choice([0.0, 0.0, 0.2])
            made.update(start_at=start, end_at=self.random.choice([1.0, 1.0, 0.6]))
        return {name: value for name, value in made.items() if value is not None}


@pytest.fixture(scope="session")
def bases(models, run):
    with torch.inference_mode():
        return {
            (family, batch): run(model, family, batch=batch) for family, model in models.items() for batch in (1, 3)
        }


@pytest.fixture(scope="session")
def compare(peer, old, models, vision, adapter_file, run, bases):
    """Run one node of both packs with the same random inputs and compare the latents, and what else they return.
    Returns by how much the image prompt changes the latents. `make` gives inputs that a pack's own nodes make.
    """

    def once(name, family, kind, seed, batch=1, pipeline=False, make=lambda nodes, adapter: {}, file=None, **given):
        file = file or adapter_file(family, kind)
        draw = Draw(seed, {"model": models[family], "clip_vision": vision, "insightface": None, **given})
        results, inputs = [], {}
        for nodes in (peer.nodes, old):
            (adapter,) = nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)
            made = make(nodes, adapter)
            draw.given = {**draw.given, **made, "ipadapter": piped(adapter, vision) if pipeline else adapter}
            inputs = inputs or draw.inputs(nodes[name].INPUT_TYPES())
            inputs = {**inputs, **made, "ipadapter": draw.given["ipadapter"]}
            outputs = getattr(nodes[name](), nodes[name].FUNCTION)(**inputs)
            results.append((run(outputs[0], family, batch=batch), outputs[1:]))
        (theirs, their_rest), (ours, our_rest) = results
        changed, error = (float((part - theirs).abs().max()) for part in (bases[family, batch], ours))
        scale = float(theirs.abs().max())
        shown = {key: value for key, value in inputs.items() if isinstance(value, str | float | int)}
        assert error <= TOLERANCE * changed + FLOAT * scale, (name, family, kind, error, changed, scale, shown)
        for one, other in zip(their_rest, our_rest, strict=True):
            assert (one is None) == (other is None), name
            assert one is None or torch.allclose(one, other, atol=1e-6), name
        return changed

    return once


def piped(adapter, vision):
    """What a unified loader gives."""
    parts = {"clipvision": vision, "ipadapter": adapter, "insightface": None}
    return {name: {"file": None, "model": model} for name, model in parts.items()}


@pytest.fixture(scope="session")
def changes() -> Callable[[list[float]], None]:
    """Asserts that comparisons compare something."""

    def check(results: list[float]) -> None:
        assert max(results) > 1e-2, results

    return check


@pytest.fixture(scope="session")
def draw() -> Callable[[int], Draw]:
    """Random inputs from a seed."""
    return lambda seed: Draw(seed, {})
