"""The old pack and ours in one ComfyUI: every apply node gives the same latents for random inputs of every option."""

from __future__ import annotations

import random

import pytest
import torch

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
        soft = torch.rand(1, 1, 4, 4, generator=self.generator)
        return torch.nn.functional.interpolate(soft, size=(height, width), mode="bilinear")[0]

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
        if "start_at" in made:
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
    """Run one node of both packs with the same random inputs; returns the difference and the other outputs."""

    def once(name, family, kind, seed, batch=1, **given):
        file = adapter_file(family, kind)
        given = {"model": models[family], "clip_vision": vision, "insightface": None, **given}
        draw = Draw(seed, given)
        results = []
        inputs = {}
        for classes in (peer.nodes, old):
            (adapter,) = classes["IPAdapterModelLoader"]().load_ipadapter_model(file)
            given["ipadapter"] = given.get("wire", lambda made: made)(adapter)
            inputs = inputs or draw.inputs({**peer.nodes[name].INPUT_TYPES()})
            cls = classes[name]
            outputs = getattr(cls(), cls.FUNCTION)(**{**inputs, "ipadapter": given["ipadapter"]})
            results.append((run(outputs[0], family, batch=batch), outputs[1:]))
        (theirs, their_rest), (ours, our_rest) = results
        changed = float((theirs - bases[family, batch]).abs().max())
        error = float((ours - theirs).abs().max())
        scale = float(theirs.abs().max())
        shown = {key: value for key, value in inputs.items() if isinstance(value, str | float | int)}
        assert error <= TOLERANCE * changed + FLOAT * scale, (name, family, kind, error, changed, scale, shown)
        return changed, their_rest, our_rest

    return once


ADVANCED = [
    "IPAdapterAdvanced",
    "IPAdapterBatch",
    "IPAdapterMS",
    "IPAdapterClipVisionEnhancer",
    "IPAdapterClipVisionEnhancerBatch",
    "IPAdapterPreciseStyleTransfer",
    "IPAdapterPreciseStyleTransferBatch",
    "IPAdapterPreciseComposition",
    "IPAdapterPreciseCompositionBatch",
    "IPAdapterTiled",
    "IPAdapterTiledBatch",
]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("name", ADVANCED)
def test_advanced_nodes(compare, name, family, kind):
    changes = [compare(name, family, kind, seed, batch=1 + 2 * (seed % 2))[0] for seed in range(3)]
    assert max(changes) > 1e-3
