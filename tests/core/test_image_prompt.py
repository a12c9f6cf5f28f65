"""Cropping, combining, the branches of guidance and the search for an encoder: node logic that needs no ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ipadapter_core import FAMILIES, AdapterError, KeyValue, LayerWeight, load_adapter, new_spec
from ipadapter_core.assets import emoji_folder
from ipadapter_core.attention import image_attention, scale_keys_values
from ipadapter_core.branches import (
    branch_rows,
    fold_weights,
    join_images,
    names_by_uuid,
    resolve_branches,
    rows_each,
    source_rows,
)
from ipadapter_core.encoders import ImageEncoder, encoder_advice, encoder_fits, find_encoder, read_encoder
from ipadapter_core.image_prompt import CLIP_MEAN, COMBINES, combine_features, crop_image


def ramp(height, width):
    """An image whose red channel is the row and whose green channel the column, in 0..1."""
    rows = torch.linspace(0, 1, height).view(1, height, 1).expand(1, height, width)
    columns = torch.linspace(0, 1, width).view(1, 1, width).expand(1, height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1)


@pytest.mark.parametrize(
    ("crop", "row", "column"),
    [("center", 0.5, 0.5), ("top", 0.25, 0.5), ("bottom", 0.75, 0.5), ("left", 0.5, 0.5), ("right", 0.5, 0.5)],
)
def test_crops_of_a_tall_image(crop, row, column):
    seen = crop_image(ramp(128, 64), 32, crop)
    assert seen.shape == (1, 32, 32, 3)
    assert seen[..., 0].mean().item() == pytest.approx(row, abs=0.02)
    assert seen[..., 1].mean().item() == pytest.approx(column, abs=0.02)


@pytest.mark.parametrize(("crop", "column"), [("left", 0.25), ("right", 0.75), ("top", 0.5)])
def test_crops_of_a_wide_image(crop, column):
    assert crop_image(ramp(64, 128), 32, crop)[..., 1].mean().item() == pytest.approx(column, abs=0.02)


def test_pad_and_stretch():
    padded = crop_image(ramp(64, 128), 32, "pad")
    torch.testing.assert_close(padded[0, 2, 5], torch.tensor(CLIP_MEAN), atol=1e-2, rtol=0)
    stretched = crop_image(ramp(64, 128), 32, "stretch")
    assert stretched[..., 1].min() < 0.05 and stretched[..., 1].max() > 0.95


def test_alpha_is_dropped_and_the_range_kept():
    image = torch.rand(2, 50, 40, 4)
    seen = crop_image(image, 24)
    assert seen.shape == (2, 24, 24, 3)
    assert seen.min() >= 0.0 and seen.max() <= 1.0
    same = torch.rand(1, 24, 24, 3)
    assert torch.equal(crop_image(same, 24), same)


def test_mask_hides_behind_the_mean_colour():
    image = torch.rand(2, 32, 32, 3)
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1.0
    seen = crop_image(image, 32, mask=mask)
    assert torch.equal(seen[:, :, :12], image[:, :, :12])
    torch.testing.assert_close(seen[:, :, 20:], torch.tensor(CLIP_MEAN).expand(2, 32, 12, 3))


def test_bad_images_and_methods_are_refused():
    with pytest.raises(AdapterError, match="Unknown crop"):
        crop_image(torch.rand(1, 8, 8, 3), 4, "middle")
    with pytest.raises(AdapterError, match="3 channels"):
        crop_image(torch.rand(8, 8, 3), 4)
    with pytest.raises(AdapterError, match="Unknown combine"):
        combine_features(torch.rand(2, 8), "mix")


def test_combine_features():
    x = torch.tensor([[1.0, 4.0], [3.0, 0.0], [2.0, 2.0]])
    want = {
        "concat": x,
        "add": [[6.0, 6.0]],
        "subtract": [[1.0 - 2.5, 4.0 - 1.0]],
        "average": [[2.0, 2.0]],
        "norm average": [[6 / 14**0.5 / 3, 6 / 20**0.5 / 3]],
        "max": [[3.0, 4.0]],
        "min": [[1.0, 0.0]],
    }
    assert set(want) == set(COMBINES)
    for combine, expected in want.items():
        torch.testing.assert_close(combine_features(x, combine), torch.as_tensor(expected))
        assert torch.equal(combine_features(x[:1], combine), x[:1])


SCALINGS = ["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]


def pair_of(images):
    return KeyValue(torch.randn(images, 6, 16), torch.randn(images, 6, 16))


def row(pair, *images):
    """The tokens of some images in one row."""
    return KeyValue(*(part[list(images)].flatten(0, 1)[None] for part in pair))


def scaled_attention(query, pair, weight, scaling):
    scaled, left = scale_keys_values(pair, weight, scaling)
    return image_attention(query, *scaled, 4, weight=left)


def test_join_images_repeats_the_shorter_side_without_changing_its_attention():
    positive, negative = torch.randn(3, 4, 8), torch.randn(2, 4, 8)
    left, right = join_images(positive, negative)
    assert left.shape == right.shape == (1, 24, 8)
    query = torch.randn(1, 5, 8)
    for joined, alone in ((left, positive), (right, negative)):
        single = alone.flatten(0, 1)[None]
        torch.testing.assert_close(
            image_attention(query, joined, joined, 2), image_attention(query, single, single, 2), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_folded_weights_equal_weighted_attention(scaling):
    pair, query = pair_of(2), torch.randn(2, 5, 16)
    folded = fold_weights(pair, LayerWeight(0.7), (1.0, 1.0), (1, 1), scaling, positives=1)
    got = image_attention(query, *folded, 4)
    for index in range(2):
        want = scaled_attention(query[index : index + 1], row(pair, index), 0.7, scaling)
        torch.testing.assert_close(got[index : index + 1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_each_joined_image_has_its_weight(scaling):
    """Equal weights are one weight; a weight of 0 takes the image's values away, not its share of the softmax."""
    pair, query = pair_of(5), torch.randn(2, 5, 16)
    equal = fold_weights(pair, LayerWeight(0.7), (0.5,) * 5, (1, 1), scaling, positives=2)
    want = fold_weights(pair, LayerWeight(0.35), (1.0,) * 5, (1, 1), scaling, positives=2)
    for part, other in zip(equal, want, strict=True):
        torch.testing.assert_close(part, other)
    assert equal.key.shape == (2, 36, 16)  # 2 and 3 images: 6 of each
    first = fold_weights(pair, LayerWeight(0.7), (1.0, 0.0, 1.0, 1.0, 1.0), (1, 1), scaling, positives=2)
    values = first.value[0].unflatten(0, (6, 6))
    assert not values[1::2].any() and values[::2].flatten(1).any(1).all()
    assert torch.isfinite(image_attention(query, *first, 4)).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_image_each(scaling):
    """Row i is image i with its own weight; a single negative image serves all."""
    pair, query = pair_of(4), torch.randn(1, 5, 16)
    weights = (1.0, 0.5, 2.0, 1.0)
    rows = branch_rows(3, 1, one_each=True, swapped=False)
    folded = fold_weights(pair, LayerWeight(0.7), weights, rows, scaling, positives=3, one_each=True)
    assert rows == (3, 1) and folded.key.shape == (4, 6, 16)
    for index, weight in enumerate(weights):
        want = scaled_attention(query, row(pair, index), 0.7 * weight, scaling)
        got = image_attention(query, folded.key[index, None], folded.value[index, None], 4)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_swapped_weights_act_in_the_negative_branch_only():
    pair, query = pair_of(2), torch.randn(1, 5, 16)
    weight = LayerWeight(0.5, swapped=True)
    folded = fold_weights(pair, weight, (1.0, 1.0), (1, 1), "K+mean(V) w/ C penalty", positives=1)
    assert not folded.value[0].any()
    got = image_attention(query, folded.key[1:], folded.value[1:], 4)
    want = scaled_attention(query, row(pair, 0), 0.5, "K+mean(V) w/ C penalty")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert fold_weights(pair, LayerWeight(0.0), (1.0, 1.0), (1, 1), positives=1) is None
    rows = branch_rows(3, 1, one_each=True, swapped=True)
    each = fold_weights(pair_of(4), weight, (1.0,) * 4, rows, positives=3, one_each=True)
    plain = fold_weights(pair_of(4), LayerWeight(0.5), (1.0,) * 4, rows, positives=3, one_each=True)
    assert rows == (3, 3) and each.key.shape == plain.key.shape == (6, 6, 16)
    assert not each.value[:3].any() and torch.equal(plain.key[3], plain.key[5])


def test_tiles_in_a_batch_that_a_layer_enlarges():
    assert source_rows((0, 1, 0), (0, 1), 4, 6) == [0, 1, 2, 3, 0, 1]
    with pytest.raises(AdapterError, match=r"samples 2 tiles in a batch, another one changes its 4 rows to 6"):
        source_rows((0, 1, 0), (0, 1), 4, 6, copies=2)


def test_one_negative_image_or_one_for_each():
    assert branch_rows(3, 3, one_each=True, swapped=False) == (3, 3)
    assert branch_rows(3, 2, one_each=False, swapped=False) == (1, 1)
    with pytest.raises(AdapterError, match=r"3 images, one for each latent, and 2 negative .* or 3\."):
        branch_rows(3, 2, one_each=True, swapped=False)
    assert branch_rows(16, 1, one_each=False, swapped=False) == branch_rows(5, 8, one_each=False, swapped=False)
    with pytest.raises(
        AdapterError, match=r"16 images and 15 negative images would have to be repeated 15 and 16 times"
    ):
        branch_rows(16, 15, one_each=False, swapped=False)


def test_branches_by_name_and_by_index():
    names = names_by_uuid(
        {
            "negative": [{"uuid": "n"}, {"uuid": "both"}],
            "middle": [{"uuid": "m"}],
            "positive": [{"uuid": "p"}, {"uuid": "both"}],
        }
    )
    assert resolve_branches([0, 1, 2], ["n", "m", "p"], names) == (1, 0, 0)
    assert resolve_branches([0], ["n"], names) == (1,)
    assert resolve_branches([1, 0], ["both", "both"], names) == (1, 0)
    assert resolve_branches([1, 0, 0], None, None) == (1, 0, 0)
    assert resolve_branches([2, 0], ["x", "y"], names) == (1, 0)


def test_an_unconditional_branch_of_any_name_is_negative():
    names = names_by_uuid(
        {
            "positive": [{"uuid": "p"}],
            "middle": [{"uuid": "m", "prompt_type": "negative"}],  # as DualCFG has it
            "null": [{"uuid": "null"}],
            "uncond_text": [{"uuid": "uncond"}],
            "empty": [{"uuid": "empty"}],
            "weak": [{"uuid": "weak", "prompt_type": "negative"}],
            "style": [{"uuid": "style"}],
        }
    )
    uuids = ["p", "m", "null", "uncond", "empty", "weak", "style"]
    assert resolve_branches([0] * 7, uuids, names) == (0, 0, 1, 1, 1, 1, 0)
    assert all(len(found) == 1 for found in names.values())
    assert rows_each(2, 6) == 3
    with pytest.raises(AdapterError, match="5 rows"):
        rows_each(2, 5)


def vision_file(path, hidden, embeds, tokens, openai=False):
    if openai:
        tensors = {
            "visual.class_embedding": torch.zeros(hidden),
            "visual.positional_embedding": torch.zeros(tokens, hidden),
            "visual.proj": torch.zeros(hidden, embeds),
        }
    else:
        tensors = {
            "vision_model.embeddings.class_embedding": torch.zeros(hidden),
            "vision_model.embeddings.position_embedding.weight": torch.zeros(tokens, hidden),
            "visual_projection.weight": torch.zeros(embeds, hidden),
        }
    save_file(tensors, path)
    return path


@pytest.fixture
def published(tmp_path):
    """The three published encoders by shape, under names that say nothing; two other files beside them."""
    (tmp_path / "0.safetensors").write_bytes(b"no model")
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "1.safetensors")
    return {
        "none": [tmp_path / "0.safetensors", tmp_path / "1.safetensors"],
        "L": vision_file(tmp_path / "2.safetensors", 1024, 768, 257),
        "H": vision_file(tmp_path / "3.safetensors", 1280, 1024, 257),
        "bigG": vision_file(tmp_path / "4.safetensors", 1664, 1280, 257, openai=True),
    }


def adapter_spec(kind, width, family="sd15"):
    context, widths = FAMILIES[family]
    return new_spec(kind, widths, context, image_dim=width)


@pytest.mark.parametrize(
    ("kind", "width", "encoder"),
    [
        ("base", 1024, "H"),
        ("base", 1280, "bigG"),
        ("base", 768, "L"),
        ("plus", 1280, "H"),
        ("plus", 1664, "bigG"),
        ("full", 1280, "H"),
    ],
)
def test_find_encoder(published, kind, width, encoder):
    files = [*published["none"], published["L"], published["H"], published["bigG"]]
    assert find_encoder(adapter_spec(kind, width), files) == published[encoder]


def test_no_encoder_names_what_there_is_and_what_to_download(published):
    with pytest.raises(AdapterError) as error:
        find_encoder(
            adapter_spec("plus", 1280), [*published["none"], published["L"]], name="x", folder="models/clip_vision"
        )
    text = str(error.value)
    for words in (
        "x",
        "hidden states of 1280",
        "2.safetensors (CLIP ViT-L/14: hidden states of 1024",
        "ViT-H-14",
        "models/clip_vision",
    ):
        assert words in text
    with pytest.raises(AdapterError, match="holds no file"):
        find_encoder(adapter_spec("base", 1280), [])


@pytest.mark.parametrize("file", ["adapter.safetensors", "adapter_base.safetensors"])
def test_an_adapter_for_the_bundled_model_names_its_node(published, file):
    spec = load_adapter(emoji_folder() / file).spec
    with pytest.raises(AdapterError, match=r"bundled demo model: choose it in Load IP Adapter Demo") as error:
        find_encoder(spec, [published["H"]])
    assert "Download" not in str(error.value)
    assert "Load IP Adapter Demo" in encoder_advice(replace(spec, encoder_id=None))  # a file without metadata
    others = (
        {"encoder_id": "CLIP vision encoder (5 layers of 160, 16 px patches at 64 px, 128 wide)"},
        {"image_dim": 96},
        {"cross_attention_dim": 256},
        {"layer_dims": spec.layer_dims[:-1]},
    )
    for other in others:
        assert "Download the image encoder that the adapter was trained with" in encoder_advice(replace(spec, **other))


def test_read_encoder(published, tmp_path):
    assert read_encoder(published["bigG"]) == ImageEncoder(1664, 1280, 257)
    assert read_encoder(published["none"][0]) is None
    assert read_encoder(tmp_path / "missing.safetensors") is None
    at_336 = ImageEncoder(1280, 1024, 577)
    assert not encoder_fits(adapter_spec("plus", 1280), at_336)  # the same widths, another resolution
    assert encoder_fits(adapter_spec("plus", 1280), ImageEncoder(1280, 1024, 257))
    assert encoder_fits(adapter_spec("plus", 48), ImageEncoder(48, 32, 10))  # nobody's: the width decides
    assert not encoder_fits(adapter_spec("full", 1280), at_336)
