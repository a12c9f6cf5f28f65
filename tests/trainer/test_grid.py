from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from ipadapter_trainer.report.image_grid import GAP, draw_grid, wrap

FONT = ImageFont.load_default(size=14)


def test_images_stand_in_their_columns_and_rows() -> None:
    colours = ("red", "lime", "blue", "yellow")
    columns = [
        (title, [Image.new("RGB", (10, 10), c) for c in pair])
        for title, pair in zip("ab", (colours[:2], colours[2:]), strict=True)
    ]
    grid = draw_grid(columns, side=50)
    assert grid.size == (GAP + 2 * (50 + GAP), 28 + 2 * (50 + GAP))
    at = {(x, y): grid.getpixel((GAP + 25 + x * 58, 28 + 25 + y * 58)) for x in (0, 1) for y in (0, 1)}
    assert at == {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (255, 255, 0)}


def test_a_image_of_another_shape_is_fitted_in() -> None:
    grid = np.asarray(draw_grid([("", [Image.new("RGB", (80, 40), "blue")])], side=40))
    cell = grid[28:68, GAP : GAP + 40]
    assert (cell[10:30] == (0, 0, 255)).all() and (cell[:10] == 255).all() and (cell[30:] == 255).all()


def test_labels_take_the_room_they_need() -> None:
    columns = [("", [Image.new("RGB", (40, 40), "blue")] * 2)]
    plain, short, long = (
        draw_grid(columns, side=80, labels=labels).width for labels in ((), ("a", "b"), ("a cat that sits", "b"))
    )
    assert plain < short < long <= plain + 80 + GAP


@pytest.mark.parametrize(
    ("text", "words_per_line", "lines", "expected"),
    [
        ("aaaa bbbb", 2, 1, ["aaaa bbbb"]),
        ("aaaa bbbb aaaa", 2, 3, ["aaaa bbbb", "aaaa"]),
        ("aaaa bbbb aaaa bbbb", 2, 1, ["aaaa bbb…"]),
        ("aaaa aaaa", 1, 2, ["aaaa", "aaaa"]),
        ("", 1, 2, [""]),
    ],
)
def test_text_is_broken_between_words_and_shortened(
    text: str, words_per_line: int, lines: int, expected: list[str]
) -> None:
    width = FONT.getlength(" ".join(["aaaa", "bbbb"][:words_per_line])) + 1
    wrapped = wrap(text, FONT, width, lines)
    assert wrapped == expected
    assert all(FONT.getlength(line) <= width for line in wrapped)


def test_a_word_that_is_too_long_is_cut() -> None:
    (line,) = wrap("supercalifragilistic", FONT, 60, 2)
    assert line.endswith("…") and "supercalifragilistic".startswith(line[:-1]) and FONT.getlength(line) <= 60
