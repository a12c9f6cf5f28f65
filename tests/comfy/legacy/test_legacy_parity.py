"""The old pack and ours in one ComfyUI: every apply node gives the same latents for random inputs of every option."""

from __future__ import annotations

import pytest
import torch

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
def test_apply_nodes(compare, changes, name, family):
    changes([compare(name, family, "base", seed, batch=1 + 2 * (seed % 2)) for seed in range(2)])


@pytest.mark.parametrize(("family", "kind"), [("sd15", "plus"), ("sd15", "full"), ("sdxl", "plus")])
@pytest.mark.parametrize("name", ["IPAdapterAdvanced", "IPAdapterClipVisionEnhancerBatch"])
def test_other_kinds(compare, changes, name, family, kind):
    changes([compare(name, family, kind, seed) for seed in range(2)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("weight_type", OLD_WEIGHT_TYPES)
def test_every_weight_type(compare, changes, family, weight_type):
    changes([compare("IPAdapterAdvanced", family, "base", 5, weight=0.8, weight_type=weight_type, **PLAIN)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_simple_node(compare, changes, family):
    changes([compare("IPAdapter", family, "base", seed, batch=3, pipeline=True) for seed in range(2)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", ["IPAdapterBatch", "IPAdapterTiledBatch", "IPAdapterPreciseCompositionBatch"])
def test_weights_by_frame(compare, changes, name, family):
    """A list of weights, longer and shorter than the batch and than the images."""
    for weight, weight_type in (
        ([0.2, 0.9], "style and composition"),
        ([1.0, 0.0, 0.5, 0.4, 1.2], "ease in"),
        ([0.5], "style transfer precise"),
    ):
        given = {} if "Precise" in name else {"weight_type": weight_type}
        changes([compare(name, family, "base", 7, batch=3, weight=weight, start_at=0.0, end_at=1.0, **given)])


def test_list_of_weights_without_frames(compare, changes):
    changes([compare("IPAdapterAdvanced", "sd15", "base", 8, weight=[0.7, 0.1], **PLAIN)])


@pytest.mark.parametrize("name", ["IPAdapterStyleComposition", "IPAdapterStyleCompositionBatch"])
def test_style_and_composition(compare, changes, draw, name):
    for seed in range(3):
        drawn = draw(100 + seed)
        # Both batches alike: with "concat" the old pack cannot do others.
        style, composition = (torch.rand(1 + seed % 3, 90, 100, 3, generator=drawn.generator) for _ in range(2))
        changes([compare(name, "sdxl", "base", seed, batch=3, image_style=style, image_composition=composition)])


@pytest.fixture
def compose(models, vision, adapter_file, run):
    """The latents of Style & Composition SDXL of one of the packs."""

    def sample(nodes, style, composition, combine):
        (adapter,) = nodes["IPAdapterModelLoader"]().load_ipadapter_model(adapter_file("sdxl", "base"))
        given = {"image_style": style, "image_composition": composition, "combine_embeds": combine}
        node = nodes["IPAdapterStyleComposition"]()
        patched = node.apply_ipadapter(models["sdxl"], adapter, clip_vision=vision, expand_style=True, **given)[0]
        return run(patched, "sdxl")

    return sample


def test_style_and_composition_images_of_different_number(peer, old, compose, pack, monkeypatch, caplog):
    """The old pack's tokens then run over into the other branch. They do not where the single image is given twice,
    which changes nothing in an attention: ours has these latents.
    """
    one, *two = torch.rand(3, 1, 90, 100, 3, generator=torch.Generator().manual_seed(4))
    two, twice = torch.cat(two), one.repeat(2, 1, 1, 1)
    for single, doubled in (((one, two), (twice, two)), ((two, one), (two, twice))):
        right, scrambled = (compose(peer.nodes, *images, "concat") for images in (doubled, single))
        ours = compose(old, *single, "concat")
        scale = float(right.abs().max())
        assert float((ours - right).abs().max()) <= 1e-5 * scale
        assert float((scrambled - right).abs().max()) > 1e-3 * scale
    assert not caplog.records
    joined, scrambled = (compose(nodes, one, two, "concat") for nodes in (old, peer.nodes))
    for combine in ("average", "add", "subtract", "norm average"):  # none acts in either pack
        assert torch.equal(compose(peer.nodes, one, two, combine), scrambled)
        assert torch.equal(compose(old, one, two, combine), joined)
        assert f"combine_embeds '{combine}' has no effect on the 2 composition images" in caplog.text
    monkeypatch.setattr(pack.execute, "is_corrected", lambda: True)
    assert not torch.equal(compose(old, one, two, "average"), joined)


def test_one_composition_image_beside_several_of_style(peer, old, compose):
    """The old pack calculates with a single image as well; here it stays as it is."""
    one, *two = torch.rand(3, 1, 90, 100, 3, generator=torch.Generator().manual_seed(4))
    two = torch.cat(two)
    for combine in ("average", "add"):
        theirs, ours = (compose(nodes, two, one, combine) for nodes in (peer.nodes, old))
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()), combine
    assert not torch.isfinite(compose(peer.nodes, two, one, "subtract")).all()
    assert torch.isfinite(compose(old, two, one, "subtract")).all()
    theirs, ours = (compose(nodes, two, one, "norm average") for nodes in (peer.nodes, old))
    assert float((ours - theirs).abs().max()) > 1e-3 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("name", ["IPAdapterEmbeds", "IPAdapterEmbedsBatch"])
def test_embeds(compare, changes, draw, vision, name, kind):
    for seed in range(3):
        drawn = draw(200 + seed)
        image, mask, weight = drawn.image(), drawn.mask(), round(drawn.random.uniform(0.3, 1.5), 2)

        def make(nodes, adapter, image=image, mask=mask, weight=weight, seed=seed):
            positive, negative = nodes["IPAdapterEncoder"]().encode(
                adapter, image, weight, mask=mask if seed % 2 else None, clip_vision=vision
            )
            return {"pos_embed": positive, **({"neg_embed": negative} if seed < 2 else {})}

        changes([compare(name, "sd15", kind, seed, batch=3, make=make)])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_params(compare, changes, draw, family):
    drawn = draw(300)
    regions = [
        (drawn.image(), drawn.mask(), weight, drawn.random.choice(OLD_WEIGHT_TYPES)) for weight in (0.9, 0.5, -0.3)
    ]

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
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    assert float((ours - run(models["sd15"], "sd15", batch=2)).abs().max()) > 1e-2
