"""A grid of images with titles: one row a prompt, one column a setting."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

FONT_SIZE, LINE, GAP = 14, 17, 8  # pixels
TITLE_LINES = 2


def draw_grid(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], *, side: int, labels: Sequence[str] = ()
) -> Image.Image:
    """Titled columns of R images each, a line after the first column (the prompts), and R labels at the left.

    An image fills a square of `side` pixels; one of another shape is fitted into it. Text that does not fit ends
    in an ellipsis.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    titles = [wrap(title, font, side, TITLE_LINES) for title, _ in columns]
    rows = max(len(images) for _, images in columns)
    header = LINE * max(len(title) for title in titles) + 11
    texts = [wrap(label, font, side, side // LINE) for label in labels]
    margin = GAP + (round(max(font.getlength(line) for text in texts for line in text)) + GAP if labels else 0)
    grid = Image.new("RGB", (margin + len(columns) * (side + GAP), header + rows * (side + GAP)), "white")
    pen = ImageDraw.Draw(grid)
    for x, (title, (_, images)) in enumerate(zip(titles, columns, strict=True)):
        left = margin + x * (side + GAP)
        pen.text((left + side / 2, header / 2), "\n".join(title), fill="black", font=font, anchor="mm", align="center")
        for y, image in enumerate(images):
            fitted = ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, "white")
            grid.paste(fitted, (left, header + y * (side + GAP)))
    for y, text in enumerate(texts):
        middle = header + y * (side + GAP) + side / 2
        pen.text((margin - GAP, middle), "\n".join(text), fill="black", font=font, anchor="rm", align="right")
    after = margin + side + GAP / 2
    pen.line([(after, GAP), (after, grid.height - GAP)], fill="lightgrey")
    return grid


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int) -> list[str]:
    """Break a text between words into at most `lines` lines of `width` pixels; what is cut off becomes "…"."""
    wrapped: list[str] = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    shown = wrapped[:lines]
    if len(wrapped) > lines:
        shown[-1] += " …"
    return [_fit(line, font, width) for line in shown]


def _fit(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Cut a line that is too long; its end may already be the ellipsis."""
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" …")
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1].rstrip()
    return kept + "…"
