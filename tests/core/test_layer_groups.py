"""Factors for the transformers of the UNet: named groups, and the text form of ComfyUI_IPAdapter_plus."""

from __future__ import annotations

import math

import pytest

from ipadapter_core import (
    LAYER_GROUPS,
    AdapterError,
    LayerFactors,
    WeightLayout,
    group_factors,
    group_indices,
    layer_weights,
    parse_factors,
)
from ipadapter_core.weight_types import WEIGHT_LAYOUTS


@pytest.mark.parametrize(("family", "count"), [("sd15", 16), ("sdxl", 11)])
def test_the_groups_share_out_all_transformers(family, count):
    indices = [index for group in LAYER_GROUPS.values() for index in group[family]]
    assert indices == list(range(count)) and all(len(group[family]) for group in LAYER_GROUPS.values())


def test_composition_and_style_are_those_of_the_weight_types():
    for family in ("sd15", "sdxl"):
        for name in ("composition", "style"):
            kind = "style transfer" if name == "style" else name
            acting = {i for i, layer in enumerate(layer_weights(kind, family)) if layer.weight}
            assert set(LAYER_GROUPS[name][family]) <= acting
    assert list(LAYER_GROUPS["style"]["sdxl"]) == [6] and list(LAYER_GROUPS["composition"]["sdxl"]) == [3]


def test_groups():
    assert group_factors("sdxl", {"style": 2.0, "early": 0.0}).factors == (0, 0, 0, 1, 1, 1, 2, 1, 1, 1, 1)
    assert group_factors("sd15", {}).factors == (1.0,) * 16
    with pytest.raises(AdapterError, match="style is nan"):
        group_factors("sdxl", {"style": math.nan})
    with pytest.raises(AdapterError, match=r"Unknown layer group 'styles'. Use one of: early, composition"):
        group_factors("sdxl", {"styles": 1.0})
    for parse in (lambda: group_factors("sd3", {}), lambda: parse_factors("sd3", "3:1")):
        with pytest.raises(AdapterError, match=r"Unknown family 'sd3'. Use one of: sd15, sdxl"):
            parse()


@pytest.mark.parametrize("text", ["3:2.5, 6:1", "3:2.5\n6:1\n", " 3 : 2.5 ,, 6 : 1,", "6:1,3:25e-1"])
def test_text(text):
    assert parse_factors("sdxl", text).factors == (0, 0, 0, 2.5, 0, 0, 1, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3:1, 11:1", "layers: entry 2, '11:1', names transformer 11; SDXL has 11, from 0 to 10"),
        ("-1:1", "entry 1, '-1:1', names transformer -1"),
        ("3:1, 6", "entry 2, '6', is not index:weight. Write for example 3:2.5, 6:1"),
        ("three:1", "entry 1, 'three:1', is not index:weight"),
        ("3:x", "is not index:weight"),
        ("3:nan", "is not index:weight"),
        ("3.5:1", "is not index:weight"),
        ("3:1:2", "is not index:weight"),
        ("6:1, 3:-1e6", "layers: entry 2, '3:-1e6', is too large. Choose numbers from -10 to 10"),
        ("3:1, 3:0.5", "entry 2, '3:0.5', names transformer 3 a second time"),
    ],
)
def test_text_that_is_wrong_is_named_with_its_place(text, message):
    with pytest.raises(AdapterError) as error:
        parse_factors("sdxl", text)
    assert message in str(error.value)


def test_factors_multiply_the_weight_type():
    layout = WEIGHT_LAYOUTS["sdxl"]
    weights = layer_weights("style transfer precise", layout, 0.8, boost=2.0)
    scaled = LayerFactors("sdxl", tuple(index / 10 for index in range(11))).scale(weights, layout)
    assert [layer.weight for layer in scaled] == pytest.approx([0, 0, 0, 0.6, 0, 0, 0.48, 0, 0, 0, 0])
    assert [layer.swapped for layer in scaled] == [layer.swapped for layer in weights]


def test_another_family_is_refused():
    factors, sd15 = parse_factors("sdxl", "6:1"), WEIGHT_LAYOUTS["sd15"]
    with pytest.raises(AdapterError) as error:
        factors.scale(layer_weights("linear", sd15), sd15)
    for words in ("are for SDXL, with 4, 1 and 6", "the connected model has 6, 1 and 9", "Choose SD1.5 there"):
        assert words in str(error.value)
    pruned = WeightLayout(4, 0, 6)
    with pytest.raises(AdapterError, match=r"has 4, 0 and 6\. Use a weight type alone"):
        factors.scale(layer_weights("linear", pruned), pruned)


def test_indices_of_a_group():
    assert group_indices("all", WeightLayout(4, 0, 6)) == range(10)
    assert group_indices("style", WEIGHT_LAYOUTS["sd2"]) == range(9, 13)
    with pytest.raises(AdapterError, match="Use 'all'"):
        group_indices("style", WeightLayout(4, 0, 6))
