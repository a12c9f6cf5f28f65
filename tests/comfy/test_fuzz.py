"""Random graphs of all nodes of the pack, valid and invalid: nothing but AdapterError ever comes out of them."""

from __future__ import annotations

import importlib.util
import math
import random
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

GRAPHS, NODES_EACH = 300, 8
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e9, 10**12, -5]
TEXTS = ["", "0:1, 3:0.5", "1.0, 0.0", "x", "5", "0:", "-1:2", "\n", "a" * 300, "0.5\n1", "99:1", "nan"]


@pytest.fixture(scope="module")
def wires(pack: Any, world: Any, encoder: Any) -> dict[str, list[Any]]:
    """What may come over a wire, by its type: sound things, and what nobody should connect."""
    with torch.inference_mode():
        sdxl = world.new_model("sdxl", seed=3)
        adapters = [world.adapter, world.new_adapter(sdxl, name="xl")]
        adapters += [world.new_adapter(world.model, kind=kind, name=kind, seed=5) for kind in ("plus", "full")]
        generator = torch.Generator().manual_seed(1)

        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator)

        positive, negative = world.conds()
        return {
            "MODEL": [world.model, world.model, sdxl],
            "IP_ADAPTER_MODEL": adapters,
            "CLIP_VISION": [encoder, encoder],
            "IMAGE": [
                rand(1, 40, 64, 3),
                rand(3, 32, 32, 3),
                rand(2, 8, 300, 4),
                rand(1, 1, 1, 1),
                rand(1, 16, 16, 3) * torch.nan,
                rand(1, 16, 16, 3) * 255,
                rand(0, 16, 16, 3),
                rand(16, 16, 3),
            ],
            "MASK": [
                torch.ones(1, 16, 16),
                torch.zeros(1, 64, 64),
                rand(2, 9, 13),
                rand(16, 16),
                rand(1, 1, 16, 16),
                rand(1, 16, 16) * torch.inf,
                rand(1, 16, 0),
            ],
            "CONDITIONING": [positive, negative],
            "LATENT": [{"samples": torch.zeros(2, 4, 16, 16)}],
            "FLOAT": [0.5, [0.1, 0.9]],
        }


def value_of(entry: Any, wires: dict[str, list[Any]], draw: random.Random) -> Any:
    """A value for an input: what its widget offers, what is connected, and now and then anything."""
    kind = entry.io_type
    odd = draw.random() < 0.08
    if kind == "COMBO":
        options = list(entry.options or [])
        return draw.choice(TEXTS) if odd or not options else draw.choice(options)
    if kind == "BOOLEAN":
        return draw.random() < 0.5
    if kind in ("FLOAT", "INT"):
        if odd:
            return draw.choice(NUMBERS)
        low, high = entry.min if entry.min is not None else 0, entry.max if entry.max is not None else 10
        low, high = max(low, -100), min(high, 100)
        return draw.randint(int(low), int(high)) if kind == "INT" else draw.uniform(low, high)
    if kind == "STRING":
        return draw.choice([entry.default or "", *TEXTS])
    found = wires.get(kind)
    return draw.choice(found) if found else None


def nothing(arguments: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Now and then an output that has nothing, as Load IP Adapter's clip_vision for faces."""
    name = draw.choice([*arguments, ""])
    return {**arguments, name: None} if name and draw.random() < 0.04 else arguments


def arguments_of(cls: Any, wires: dict[str, list[Any]], draw: random.Random) -> dict[str, Any] | None:
    """Keyword arguments for a node, or None when nothing of a type that it needs is there."""
    arguments: dict[str, Any] = {}
    for entry in cls.define_schema().inputs:
        if entry.optional and draw.random() < 0.5:
            continue
        value = value_of(entry, wires, draw)
        if value is None:
            if entry.optional:
                continue
            return None
        arguments[entry.id] = value
    return arguments


@pytest.fixture
def files(pack: Any, world: Any, folders: dict[str, Path], tmp_path: Path, request: Any, monkeypatch: Any) -> set[str]:
    """An adapter file, and face models where insightface is there. Returns the nodes that cannot run without it."""
    sites = pack.core.cross_attention_sites(world.model.get_model_object("diffusion_model"))
    spec = pack.core.new_spec("faceid", [site.dim for site in sites], sites[0].cross_attention_dim, lora_rank=4)
    adapter = pack.core.IPAdapter(spec)
    world.randomise(adapter, seed=7)
    pack.core.save_adapter(folders["ipadapter"] / "face.safetensors", adapter)
    if importlib.util.find_spec("insightface") is None:
        return {"LoadFaceAnalysis", "EncodeFacePrompt"}
    import folder_paths

    models = request.getfixturevalue("face_models")
    models.write_pack(tmp_path / "insightface" / "models" / "buffalo_l")
    places = ([str(tmp_path / "insightface")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", places)
    wires = request.getfixturevalue("wires")
    wires["IMAGE"] += [models.draw_faces((32, 10, 9))[None]] * 6
    wires["IP_ADAPTER_MODEL"] += [pack.LoadIPAdapter.execute("face.safetensors").args[0]] * 3
    wires["FACE_ANALYSIS"] = list(pack.LoadFaceAnalysis.execute("buffalo_l").args)
    return set()


def test_random_graphs(pack: Any, world: Any, wires: dict[str, list[Any]], files: set[str]) -> None:
    classes = [cls for cls in pack.classes if not cls.define_schema().is_deprecated]
    others: dict[str, str] = {}
    ran, refused = dict.fromkeys((cls.__name__ for cls in classes), 0), 0
    for graph in range(GRAPHS):
        draw = random.Random(graph)
        pool = {kind: list(values) for kind, values in wires.items()}
        for _ in range(NODES_EACH):
            cls = draw.choice(classes)
            arguments = arguments_of(cls, pool, draw)
            if arguments is None:
                continue
            try:
                made = cls.execute(**nothing(arguments, draw))
            except pack.core.AdapterError as error:
                assert 20 < len(str(error)) < 1000, error
                refused += 1
                continue
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                others.setdefault(
                    f"{cls.__name__}: {type(error).__name__}: {str(error)[:100]} at {place}",
                    f"graph {graph}: { ({k: getattr(v, 'shape', v) for k, v in arguments.items()}) }"[:700],
                )
                continue
            ran[cls.__name__] += 1
            outputs = cls.define_schema().outputs
            for output, value in zip(outputs, made.args or (), strict=False):
                if value is not None:
                    pool.setdefault(output.io_type, []).append(value)
        model = pool["MODEL"][-1]
        width = pack.core.cross_attention_sites(model.get_model_object("diffusion_model"))[0].cross_attention_dim
        if graph % 5 == 0 and width == wires["CONDITIONING"][0][0][0].shape[-1]:  # not the demo's model
            try:
                sampled = world.sample(model, steps=1, cfg=draw.choice([1.0, 4.0]), batch=draw.choice([1, 2]))
                assert sampled.shape[1] == 4
            except pack.core.AdapterError:
                refused += 1
    assert not others, "\n".join(f"{what}\n    {where}" for what, where in others.items())
    assert {name for name, times in ran.items() if not times} == files, ran
    assert refused > GRAPHS / 10
