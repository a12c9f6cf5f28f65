"""Many small images with their captions in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..runtime.disk import whole_file

SIDE = 192  # pixels of an image's cell
_INSET = 76  # of the reference in it
_LINES, _LINE, _FONT, _GAP = 4, 15, 12, 12
_COLUMNS = 6


@dataclass(frozen=True)
class Cell:
    """One cell."""

    image: Image.Image
    title: str
    text: str
    reference: Image.Image | None = None


def contact_sheet(cells: Sequence[Cell], path: Path) -> None:
    """Write a sheet of images, each with a title and its caption below; a reference is in the lower right corner."""
    font = ImageFont.load_default(_FONT)
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = SIDE + _GAP, SIDE + (1 + _LINES) * _LINE + _GAP + 4
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = _GAP + i % columns * width, _GAP + i // columns * height
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill="#e8e8e8")
        _paste(sheet, cell.image, (x, y), SIDE)
        if cell.reference is not None:
            corner = x + SIDE - _INSET, y + SIDE - _INSET
            draw.rectangle((corner[0] - 2, corner[1] - 2, x + SIDE - 1, y + SIDE - 1), fill="white")
            _paste(sheet, cell.reference, corner, _INSET)
        draw.text((x, y + SIDE + 4), _shorten(cell.title, font), "#777777", font)
        for number, line in enumerate(_wrap(cell.text, font), 1):
            draw.text((x, y + SIDE + 4 + number * _LINE), line, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        sheet.save(temporary)


def _paste(sheet: Image.Image, image: Image.Image, corner: tuple[int, int], side: int) -> None:
    small = image.copy()
    small.thumbnail((side, side))
    sheet.paste(small, (corner[0] + (side - small.width) // 2, corner[1] + (side - small.height) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """As many lines as there is room for; the last says by three dots that there was more."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < _LINES:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= SIDE:
            count += 1
        if len(lines) == _LINES - 1:
            count = len(words)
        lines.append(_shorten(" ".join(words[:count]), font))
        words = words[count:]
    return lines


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= SIDE:
        return text
    text = text[: SIDE // 2]  # more never fits, and measuring a long text is slow
    while text and font.getlength(text + "...") > SIDE:
        text = text[:-1]
    return text + "..."
