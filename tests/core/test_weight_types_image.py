"""The image of the weight types in the help page of Apply IP Adapter shows the weights of today's table."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from ipadapter_core.weight_types import WEIGHT_TYPES, layer_weights

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "web" / "docs" / "ApplyIPAdapter.md"


def load_script():
    spec = importlib.util.spec_from_file_location("draw_weight_types", ROOT / "docs" / "draw_weight_types.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


SCRIPT = load_script()
COLOURS = {ImageColor.getrgb(SCRIPT.ACTS): False, ImageColor.getrgb(SCRIPT.PUSHES): True}  # colour -> swapped


@pytest.fixture(scope="module")
def image():
    with Image.open(SCRIPT.FILE) as opened:
        return opened.convert("RGB")


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_every_bar_is_as_high_as_the_weight(image, weight_type):
    """Measured in the file: the colour of each pixel in the middle of a layer's bar."""
    assert image.size == SCRIPT.SIZE
    number = WEIGHT_TYPES.index(weight_type)
    for layer, weight in enumerate(layer_weights(weight_type, "sd15")):
        left, top, right, bottom = SCRIPT.track(number, layer)
        column = [image.getpixel(((left + right) // 2, y)) for y in range(top, bottom + 1)]
        drawn = [COLOURS[colour] for colour in column if colour in COLOURS]
        assert len(drawn) == round(weight.weight * SCRIPT.FULL), layer
        assert set(drawn) <= {weight.swapped}, layer
        assert column[len(column) - len(drawn) :] == [c for c in column if c in COLOURS], "a bar stands on the line"


def test_it_is_what_the_script_draws(image):
    """The whole file; one other letter changes about 400 pixels."""
    drawn = SCRIPT.draw()
    pixels = zip(image.convert("L").tobytes(), drawn.convert("L").tobytes(), strict=True)
    different = sum(abs(one - other) > 64 for one, other in pixels)
    assert different < 200


def test_the_help_page_shows_it():
    """By a path that holds on GitHub and in ComfyUI, which serves the folder of the page."""
    (name,) = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert PAGE.with_name(name) == SCRIPT.FILE
    assert SCRIPT.FILE.stat().st_size <= 60_000
