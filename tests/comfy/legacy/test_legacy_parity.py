"""The old pack and ours in one ComfyUI: every apply node gives the same latents for random inputs of every option."""

from __future__ import annotations

import random

import pytest
import torch

TOLERANCE = 1e-3  # of the scale of what the image prompt changes
PLAIN = {"start_at": 0.0, "end_at": 1.0, "attn_mask": None}
OLD_WEIGHT_TYPES = [
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak output",
    "weak middle",
    "strong middle",
    "style transfer",
    "composition",
    "strong style transfer",
    "style and composition",
    "style transfer precise",
    "composition precise",
]
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

    def once(name, family, kind, seed, batch=1, pipeline=False, make=lambda nodes, adapter: {}, **given):
        file = adapter_file(family, kind)
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


def changes(results):
    """The comparisons compare something."""
    assert max(results) > 1e-2, results


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
@pytest.mark.parametrize("name", ADVANCED)
def test_apply_nodes(compare, name, family):
    changes([compare(name, family, "base", seed, batch=1 + 2 * (seed % 2)) for seed in range(2)])


@pytest.mark.parametrize(("family", "kind"), [("sd15", "plus"), ("sd15", "full"), ("sdxl", "plus")])
@pytest.mark.parametrize("name", ["IPAdapterAdvanced", "IPAdapterClipVisionEnhancerBatch"])
def test_other_kinds(compare, name, family, kind):
    changes([compare(name, family, kind, seed) for seed in range(2)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("weight_type", OLD_WEIGHT_TYPES)
def test_every_weight_type(compare, family, weight_type):
    changes([compare("IPAdapterAdvanced", family, "base", 5, weight=0.8, weight_type=weight_type, **PLAIN)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_simple_node(compare, family):
    changes([compare("IPAdapter", family, "base", seed, batch=3, pipeline=True) for seed in range(2)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", ["IPAdapterBatch", "IPAdapterTiledBatch", "IPAdapterPreciseCompositionBatch"])
def test_weights_by_frame(compare, name, family):
    """A list of weights, longer and shorter than the batch and than the images."""
    for weight, weight_type in (
        ([0.2, 0.9], "style and composition"),
        ([1.0, 0.0, 0.5, 0.4, 1.2], "ease in"),
        ([0.5], "style transfer precise"),
    ):
        given = {} if "Precise" in name else {"weight_type": weight_type}
        changes([compare(name, family, "base", 7, batch=3, weight=weight, start_at=0.0, end_at=1.0, **given)])


def test_list_of_weights_without_frames(compare):
    changes([compare("IPAdapterAdvanced", "sd15", "base", 8, weight=[0.7, 0.1], **PLAIN)])


@pytest.mark.parametrize("name", ["IPAdapterStyleComposition", "IPAdapterStyleCompositionBatch"])
def test_style_and_composition(compare, name):
    for seed in range(3):
        draw = Draw(100 + seed, {})
        # Both batches alike: with "concat" the old pack cannot do others.
        style, composition = (torch.rand(1 + seed % 3, 90, 100, 3, generator=draw.generator) for _ in range(2))
        changes([compare(name, "sdxl", "base", seed, batch=3, image_style=style, image_composition=composition)])


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("name", ["IPAdapterEmbeds", "IPAdapterEmbedsBatch"])
def test_embeds(compare, vision, name, kind):
    for seed in range(3):
        draw = Draw(200 + seed, {})
        image, mask, weight = draw.image(), draw.mask(), round(draw.random.uniform(0.3, 1.5), 2)

        def make(nodes, adapter, image=image, mask=mask, weight=weight, seed=seed):
            positive, negative = nodes["IPAdapterEncoder"]().encode(
                adapter, image, weight, mask=mask if seed % 2 else None, clip_vision=vision
            )
            return {"pos_embed": positive, **({"neg_embed": negative} if seed < 2 else {})}

        changes([compare(name, "sd15", kind, seed, batch=3, make=make)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_params(compare, family):
    draw = Draw(300, {})
    regions = [(draw.image(), draw.mask(), weight, draw.random.choice(OLD_WEIGHT_TYPES)) for weight in (0.9, 0.5, -0.3)]

    def make(nodes, adapter):
        made = [
            nodes["IPAdapterRegionalConditioning"]().conditioning(image, weight, 1.0, kind, 0.0, 1.0, mask=mask)[0]
            for image, mask, weight, kind in regions
        ]
        return {"ipadapter_params": nodes["IPAdapterCombineParams"]().combine(*made)[0]}

    changes([compare("IPAdapterFromParams", family, "base", seed, make=make) for seed in range(2)])


@pytest.mark.parametrize("name", ["IPAdapterBatch", "IPAdapterAdvanced"])
def test_windows_of_animatediff(peer, old, models, vision, adapter_file, run, name):
    """Frames 1 and 3 of 4, with an image, a weight and a mask each."""
    file = adapter_file("sd15", "base")
    generator = torch.Generator().manual_seed(9)
    inputs = {
        "image": torch.rand(4, 80, 80, 3, generator=generator),
        "attn_mask": torch.rand(4, 64, 64, generator=generator),
        "weight": [0.2, 0.9, 0.4, 1.3],
        "weight_type": "linear",
        "clip_vision": vision,
    }
    latents = []
    for nodes in (peer.nodes, old):
        (adapter,) = nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)
        patched = nodes[name]().apply_ipadapter(model=models["sd15"], ipadapter=adapter, **inputs)[0].clone()
        frames = {"sub_idxs": [1, 3], "full_length": 4, "context_length": 2}
        patched.model_options["transformer_options"]["ad_params"] = frames
        latents.append(run(patched, "sd15", batch=2))
    theirs, ours = latents
    assert float((ours - theirs).abs().max()) <= FLOAT * float(theirs.abs().max())
    assert float((ours - run(models["sd15"], "sd15", batch=2)).abs().max()) > 1e-2
