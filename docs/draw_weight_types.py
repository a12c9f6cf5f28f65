"""The image of the weight types in the help page of Apply IP Adapter: what each gives to every layer of SD1.5.

    python docs/draw_weight_types.py

Drawn from the library's own table; tests/core/test_weight_types_image.py measures the bars of the file.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ipadapter_core.weight_types import WEIGHT_LAYOUTS, WEIGHT_TYPES, layer_weights

FILE = Path(__file__).resolve().parents[1] / "web" / "docs" / "weight_types.png"
LAYOUT = WEIGHT_LAYOUTS["sd15"]
COLUMNS = 4
# Pixels, twice what ComfyUI's help panel shows.
CELL, GAP, HEAD, ROW = 276, 8, 52, 128
FULL = 72  # the height of weight 1
BAR, STEP, STAGE = 11, 14, 11  # width of a bar, distance of two, extra distance on both sides of the middle block
BACKGROUND, CARD, TRACK, TEXT, FAINT = "#171718", "#222225", "#303035", "#f2f2f2", "#b4b4bc"
ACTS, PUSHES = "#4da3ff", "#ff9f43"
SIZE = (COLUMNS * CELL + (COLUMNS + 1) * GAP, HEAD + -(-len(WEIGHT_TYPES) // COLUMNS) * (ROW + GAP))


def cell(number: int) -> tuple[int, int]:
    """Left and top of a weight type's card."""
    row, column = divmod(number, COLUMNS)
    return GAP + column * (CELL + GAP), HEAD + row * (ROW + GAP)


def track(number: int, layer: int) -> tuple[int, int, int, int]:
    """Where the bar of a layer stands when its weight is 1: left, top, right and bottom, all inside."""
    left, top = cell(number)
    stages = int(layer >= LAYOUT.inputs) + int(layer >= LAYOUT.inputs + LAYOUT.middle)
    width = (LAYOUT.transformers - 1) * STEP + BAR + 2 * STAGE
    x = left + (CELL - width) // 2 + layer * STEP + stages * STAGE
    return x, top + 12, x + BAR - 1, top + 12 + FULL - 1


def draw() -> Image.Image:
    image = Image.new("RGB", SIZE, BACKGROUND)
    canvas = ImageDraw.Draw(image)
    legend_font, name_font = ImageFont.load_default(21), ImageFont.load_default(20)
    legend = "Weight in SD1.5's layers: before the middle block, in it, after it"
    canvas.text((GAP + 6, HEAD // 2), legend, FAINT, legend_font, "lm")
    for colour, text, x in ((ACTS, "acts", 860), (PUSHES, "pushes away", 955)):
        canvas.rectangle((x, HEAD // 2 - 7, x + 14, HEAD // 2 + 7), colour)
        canvas.text((x + 24, HEAD // 2), text, TEXT, legend_font, "lm")
    for number, weight_type in enumerate(WEIGHT_TYPES):
        left, top = cell(number)
        canvas.rounded_rectangle((left, top, left + CELL - 1, top + ROW - 1), 8, CARD)
        for layer, weight in enumerate(layer_weights(weight_type, LAYOUT)):
            x, high, right, low = track(number, layer)
            canvas.rectangle((x, high, right, low), TRACK)
            tall = round(weight.weight * FULL)
            if tall:
                canvas.rectangle((x, low - tall + 1, right, low), PUSHES if weight.swapped else ACTS)
        canvas.text((left + CELL // 2, top + ROW - 22), weight_type, TEXT, name_font, "mm")
    return image


if __name__ == "__main__":
    draw().quantize(64, dither=Image.Dither.NONE).save(FILE, optimize=True)
    print(f"{FILE.name}: {SIZE[0]} x {SIZE[1]}, {FILE.stat().st_size:,} bytes")
