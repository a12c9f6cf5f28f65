"""A grid of images with titles, labels and captions."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

FONT_SIZE, LINE, GAP = 14, 17, 8  # pixels
TITLE_LINES, CAPTION_LINES = 2, 5


def draw_grid(
    columns: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    side: int,
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Columns of images, each with a title, and a line after the first column if there are titles. `labels` are at the
    left of the rows, `captions` (those of a column together) below the images.

    An image fills a square of `side` pixels; one of another shape is fitted into it. Text that is too long is cut and
    ends in an ellipsis.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    titles = [wrap(title, font, side, TITLE_LINES) for title, _ in columns]
    rows = max(len(images) for _, images in columns)
    header = LINE * max(len(title) for title in titles) + 11
    texts = [wrap(label, font, side, side // LINE) for label in labels]
    margin = GAP + (round(max(font.getlength(line) for text in texts for line in text)) + GAP if labels else 0)
    width, height = side + GAP, side + GAP + (LINE * CAPTION_LINES if captions else 0)
    grid = Image.new("RGB", (margin + len(columns) * width, header + rows * height), "white")
    pen = ImageDraw.Draw(grid)
    for x, (title, (_, images)) in enumerate(zip(titles, columns, strict=True)):
        left = margin + x * width
        pen.text((left + side / 2, header / 2), "\n".join(title), fill="black", font=font, anchor="mm", align="center")
        for y, image in enumerate(images):
            top = header + y * height
            grid.paste(ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, "white"), (left, top))
            if captions:
                text = "\n".join(wrap(captions[x][y], font, side, CAPTION_LINES))
                pen.multiline_text((left, top + side + 2), text, fill="black", font=font, spacing=LINE - FONT_SIZE)
    for y, text in enumerate(texts):
        middle = header + y * height + side / 2
        pen.text((margin - GAP, middle), "\n".join(text), fill="black", font=font, anchor="rm", align="right")
    if any(title for title, _ in columns):
        pen.line([(margin + side + GAP / 2, y) for y in (GAP, grid.height - GAP)], fill="lightgrey")
    return grid


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int) -> list[str]:
    """Break a text between words into at most `lines` lines of `width` pixels; what is cut off becomes "…"."""
    wrapped: list[str] = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word[: int(width)]}".strip()  # more characters never fit, and measuring them is slow
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
        elif len(wrapped) == lines:
            wrapped[-1] += " …"
            break
        else:
            wrapped.append(word[: int(width)])
    return [_fit(line, font, width) for line in wrapped]


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Cut a line that is too long; it may already end in an ellipsis."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(line + "…") > width:
        line = line[:-1].rstrip()
    return line + "…"
