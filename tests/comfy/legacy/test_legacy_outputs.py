"""The old nodes that give images, weights, EMBEDS or parameters: the same outputs as the old pack's."""

from __future__ import annotations

import itertools
import random

import pytest
import torch


def both(peer, old, name, *args, **kwargs):
    """What both packs' nodes return."""
    return [getattr(nodes[name](), nodes[name].FUNCTION)(*args, **kwargs) for nodes in (peer.nodes, old)]


def same(one, other, tolerance=1e-6):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, atol=tolerance)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key], tolerance) for key in one)
    return one == pytest.approx(other) if isinstance(one, float) else one == other


@pytest.fixture
def image():
    def make(height, width, count=1, seed=0):
        return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.mark.parametrize("kind", ["fade", "dissolve", "gaussian", "shuffle"])
@pytest.mark.parametrize("given", [None, (100, 150, 1), (300, 224, 2), (224, 224, 1)])
def test_noise(peer, old, image, kind, given):
    source = {} if given is None else {"image_optional": image(*given)}
    for strength, blur in ((1.0, 0), (0.35, 4), (0.0, 7)):
        theirs, ours = both(peer, old, "IPAdapterNoise", kind, strength, blur, **source)
        assert same(theirs, ours, tolerance=1e-4)  # a displacement of a pixel is rounded differently


def test_noise_leaves_the_random_state_alone(old, image):
    state = torch.get_rng_state()
    for kind in ("fade", "dissolve", "gaussian", "shuffle"):
        old["IPAdapterNoise"]().make_noise(kind, 0.5, 3, image_optional=image(64, 80))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("crop", ["top", "bottom", "left", "right", "center", "pad"])
@pytest.mark.parametrize("size", [(100, 151), (301, 90), (64, 64)])
def test_prep_image(peer, old, image, crop, size):
    for resample, sharpening in (("LANCZOS", 0.0), ("NEAREST", 0.5), ("BICUBIC", 1.0), ("HAMMING", 0.1)):
        theirs, ours = both(peer, old, "PrepImageForClipVision", image(*size, 2), resample, crop, sharpening)
        assert same(theirs, ours)
    for resample in ("BILINEAR", "BOX"):
        assert same(*both(peer, old, "PrepImageForClipVision", image(*size), resample, crop, 0.0))


TIMINGS = ["custom", "linear", "ease_in_out", "ease_in", "ease_out"]
METHODS = ["full batch", "shift batches", "alternate batches"]


@pytest.mark.parametrize(("timing", "method"), list(itertools.product(TIMINGS, METHODS)))
def test_weights(peer, old, image, timing, method):
    draw = random.Random(f"{timing} {method}")
    for images in (None, 2, 3, 4, 5):
        given = {
            "weights": draw.choice(["1.0, 0.0", "0.2,0.9\n0.4,", "0.7"]),
            "timing": timing,
            "frames": draw.choice([0, 5, 8]),
            "start_frame": draw.choice([0, 0, 2]),
            "end_frame": draw.choice([9999, 6, 4]),
            "add_starting_frames": draw.choice([0, 3]),
            "add_ending_frames": draw.choice([0, 2]),
            "method": method,
            **({} if images is None else {"image": image(8, 8, images)}),
        }
        if timing != "custom" and min(given["end_frame"], max(given["frames"], 2)) - given["start_frame"] < 2:
            given["start_frame"] = 0  # a single frame: the old node divides by zero
        theirs, ours = both(peer, old, "IPAdapterWeights", **given)
        assert same(theirs, ours), given
        again = {"weights_strategy": theirs[-1], "image": image(8, 8, 3, seed=1)}
        assert same(*both(peer, old, "IPAdapterWeightsFromStrategy", **again))
        for prompt in ("", "a\n\nb\nc\nd\ne\nf", "one"):
            assert same(*both(peer, old, "IPAdapterPromptScheduleFromWeightsStrategy", theirs[-1], prompt))


def test_one_frame_and_random_weights(old):
    """Where the old node stops with a division by zero, the last weight is used."""
    weights, *_ = old["IPAdapterWeights"]().weights("0.2, 0.8", "linear", frames=4, start_frame=3)
    assert weights == [0.2, 0.2, 0.2, 0.8]
    weights, inverted, count, *_ = old["IPAdapterWeights"]().weights("0.2, 0.8", "random", frames=6)
    assert count == 6 and inverted == weights[::-1] and len(set(weights)) == 6
    assert all(0.2 <= weight <= 0.8 for weight in weights)


def test_combine_weights(peer, old):
    for one, other in ((0.3, [0.1, 0.2]), ([0.5], 0.4), ([1.0, 0.2], [0.3])):
        assert same(*both(peer, old, "IPAdapterCombineWeights", one, other))


@pytest.mark.parametrize("method", ["concat", "add", "subtract", "average", "norm average", "max", "min"])
def test_combine_embeds(peer, old, method):
    generator = torch.Generator().manual_seed(3)
    embeds = [torch.randn(count, 5, 8, generator=generator) for count in (1, 2, 1, 3, 1)]
    for count in (2, 3, 5):
        assert same(*both(peer, old, "IPAdapterCombineEmbeds", embeds[0], method, *embeds[1:count]))
    if method in ("concat", "add", "average", "max", "min"):
        assert same(*both(peer, old, "IPAdapterCombineEmbeds", embeds[0], method))


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_encoder(peer, old, vision, adapter_file, image, kind):
    file = adapter_file("sd15", kind)
    pairs = [nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)[0] for nodes in (peer.nodes, old)]
    mask = torch.rand(1, 60, 90, generator=torch.Generator().manual_seed(4))
    for options in ({}, {"mask": mask}, {"mask": mask[:, :, :60]}):
        results = [
            nodes["IPAdapterEncoder"]().encode(adapter, image(90, 120, 2), 0.7, clip_vision=vision, **options)
            for nodes, adapter in zip((peer.nodes, old), pairs, strict=True)
        ]
        assert same(*results, 1e-5)


def test_embeds_are_saved_and_loaded_by_either_pack(peer, old, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    embeds = torch.randn(2, 5, 8)
    for name, writer in (("theirs", peer.nodes), ("ours", old)):
        assert writer["IPAdapterSaveEmbeds"]().save(embeds, f"sub/{name}") == (None,)
        file = f"sub/{name}_00001.ipadpt"
        assert file in peer.nodes["IPAdapterLoadEmbeds"].INPUT_TYPES()["required"]["embeds"][0]
        assert file in old["IPAdapterLoadEmbeds"].INPUT_TYPES()["required"]["embeds"][0]
        for reader in (peer.nodes, old):
            assert torch.equal(reader["IPAdapterLoadEmbeds"]().load(file)[0], embeds)


def test_saved_embeds_are_never_overwritten(old, tmp_path, monkeypatch):
    """Older versions of ComfyUI do not count files of this name."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    saved = [torch.full((1, 8), float(number)) for number in range(3)]
    for embeds in saved:
        old["IPAdapterSaveEmbeds"]().save(embeds, "emb")
    names = [f"emb_{number:05}.ipadpt" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, embeds in zip(names, saved, strict=True):
        assert torch.equal(old["IPAdapterLoadEmbeds"]().load(name)[0], embeds)


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/x", "a\x00b", "a\ud800b", "n" * 300])
def test_names_that_embeds_cannot_have(pack, old, tmp_path, monkeypatch, prefix):
    import folder_paths

    (tmp_path / "output").mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    with pytest.raises(pack.core.AdapterError, match="filename_prefix"):
        old["IPAdapterSaveEmbeds"]().save(torch.zeros(1, 8), prefix)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_fingerprint_of_embeds_is_that_of_a_listed_file(pack, old, tmp_path, monkeypatch):
    """It reads no other file, whatever comes as the name, and it does not fail."""
    import folder_paths

    inside = tmp_path / "input"
    (inside / "sub.ipadpt").mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "input_directory", str(inside))
    for file in (inside / "a.ipadpt", tmp_path / "b.ipadpt"):
        torch.save(torch.randn(1, 8), file)
    node = old["IPAdapterLoadEmbeds"]
    assert node.INPUT_TYPES()["required"]["embeds"][0] == ["a.ipadpt"]
    unknown = node.fingerprint_inputs(embeds=None)
    for name in (
        "../b.ipadpt",
        str(tmp_path / "b.ipadpt"),
        "b.ipadpt [temp]",
        "gone.ipadpt",
        "sub.ipadpt",
        5,
        ["1", 0],
    ):
        assert node.fingerprint_inputs(embeds=name) == unknown, name
        with pytest.raises(pack.core.AdapterError, match="There are no embeds"):
            node().load(name)
    assert node.fingerprint_inputs() == unknown
    before = node.fingerprint_inputs(embeds="a.ipadpt")
    torch.save(torch.randn(2, 8), inside / "a.ipadpt")
    assert len({unknown, before, node.fingerprint_inputs(embeds="a.ipadpt")}) == 3


def test_no_code_runs_from_a_file_of_embeds(pack, old, tmp_path, monkeypatch):
    import folder_paths

    class Code:
        def __reduce__(self):
            return (exec, ("raise RuntimeError('code ran')",))

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    torch.save(Code(), tmp_path / "bad.ipadpt")
    with pytest.raises(pack.core.AdapterError, match=r"bad\.ipadpt"):
        old["IPAdapterLoadEmbeds"]().load("bad.ipadpt")


def test_regional_conditioning_and_params(peer, old, image):
    mask = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(5))
    cond = [[torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(6)), {"pooled_output": torch.zeros(1, 4)}]]
    made = []
    for options in ({}, {"mask": mask}, {"mask": mask, "positive": cond}, {"positive": cond, "negative": cond}):
        theirs, ours = both(
            peer, old, "IPAdapterRegionalConditioning", image(8, 8), 0.7, 2.0, "ease in", 0.1, 0.9, **options
        )
        assert same(theirs, ours)
        made.append(ours[0])
    for count in (2, 3, 4):
        assert same(*both(peer, old, "IPAdapterCombineParams", *made[:count]))


def test_tiles_and_masks(peer, old, models, vision, adapter_file, image):
    """Of every proportion; the latents are compared in test_legacy_parity."""
    file = adapter_file("sd15", "base")
    generator = torch.Generator().manual_seed(8)
    for size in ((100, 100), (100, 130), (90, 200), (300, 70), (60, 400), (500, 90)):
        mask = torch.rand(1, 50, 60, generator=generator) if size[0] > 90 else None
        results = []
        for nodes in (peer.nodes, old):
            (adapter,) = nodes["IPAdapterModelLoader"]().load_ipadapter_model(file)
            tiled = nodes["IPAdapterTiled"]().apply_tiled(
                models["sd15"], adapter, image(*size), 1.0, "linear", 0.0, 1.0, 0.3, attn_mask=mask, clip_vision=vision
            )
            results.append(tiled[1:])
        assert same(*results, 1e-5), size
