"""Build the emoji images from the Iconify packages: render, caption, split, write one zip.

    npm install --prefix icons @iconify-json/fluent-emoji @iconify-json/noto @iconify-json/twemoji \
        @iconify-json/noto-v1 @iconify-json/emojione
    python -m tools.emoji.build icons/node_modules/@iconify-json assets/emoji/pictures.zip

The zip holds ``metadata.jsonl`` (imagefolder rows: file_name, text, concept, style, split) and one lossless WebP
an image. There are three splits:

* ``train``;
* ``held_out``: a known concept in the one style that is kept from every training;
* ``unseen``: concepts that no training sees in any style.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from ipadapter_trainer.demo.emoji import caption
from ipadapter_trainer.demo.views import GRID

from .concepts import CONCEPTS, NEW_CONCEPTS, TEXT_CONCEPTS, UNSEEN_CONCEPTS

SIZE = 128
STROKE = 0.025  # of the icon's width: the outline of the comic style

Drawing = Literal["plain", "comic", "pixel"]


@dataclass(frozen=True)
class Style:
    """One icon package and how it is drawn: ``name`` is the word in captions, ``author`` and ``licence`` the
    attribution.
    """

    name: str
    package: str
    author: str
    licence: str
    drawing: Drawing = "plain"


STYLES = (
    Style("fluent", "fluent-emoji", "Microsoft Corporation", "MIT"),
    Style("noto", "noto", "Google Inc", "Apache-2.0"),
    Style("twemoji", "twemoji", "Twitter, Inc and other contributors", "CC-BY-4.0"),
    Style("comic", "noto-v1", "Google Inc", "Apache-2.0", "comic"),
    Style("pixel", "emojione", "EmojiOne (EmojiTwo)", "CC-BY-4.0", "pixel"),
)


def draw_number(concept: str, what: str, sides: int) -> int:
    """A number below ``sides`` that depends on the concept's name only."""
    return int(hashlib.sha256(f"{what} {concept}".encode()).hexdigest(), 16) % sides


def split_of(concept: str, style: str) -> str:
    """Return "train", "held_out" or "unseen".

    Of the ``NEW_CONCEPTS`` a plain drawing is held out, of most of the others the comic or the pixel drawing.
    The text concepts are trained in every style.
    """
    if concept in UNSEEN_CONCEPTS:
        return "unseen"
    if concept in TEXT_CONCEPTS:
        return "train"
    plain = [style.name for style in STYLES if style.drawing == "plain"]
    if concept in NEW_CONCEPTS:
        kept = plain[draw_number(concept, "plain", len(plain))]
    else:
        kept = ("comic", "pixel", *[""] * 5)[draw_number(concept, "drawing", 7)]
    return "held_out" if style == kept else "train"


def svg(icons: dict[str, Any], name: str, drawing: Drawing = "plain") -> str:
    """Wrap the body of an Iconify icon into a standalone SVG document; "comic" gives every shape a dark outline."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    outline = ""
    if drawing == "comic":
        outline = (
            "<style>path,circle,ellipse,rect,polygon{stroke:#1a1a1a;stroke-linejoin:round;"
            f"stroke-width:{STROKE * width}px}}</style>"
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{outline}{icon["body"]}</svg>'
    )


def rasterize(document: str, size: int) -> Image.Image:
    """Render an SVG document on white, centred: a size x size RGB image."""
    import resvg_py  # only the builder needs it

    png = resvg_py.svg_to_bytes(
        svg_string=document, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return ImageOps.pad(image, (size, size), color="white")  # a few icons are not square


def render(document: str, drawing: Drawing = "plain", size: int = SIZE) -> Image.Image:
    """An SVG document as a size x size RGB image; "pixel" is pixel art of 16 x 16 colours."""
    if drawing == "pixel":
        small = rasterize(document, 512).resize((GRID, GRID), Image.Resampling.BOX)
        return small.resize((size, size), Image.Resampling.NEAREST)
    margin = size // GRID
    return ImageOps.expand(rasterize(document, size - 2 * margin), margin, "white")


def read_icons(packages: Path, package: str) -> dict[str, Any]:
    """An Iconify package: its "icons" by name, and their size."""
    file = packages / package / "icons.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: npm install @iconify-json/{package} first")
    return json.loads(file.read_text(encoding="utf-8"))


def _names(icons: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Style, str]]:
    """Yield (concept, style, icon name in that style's package) in a fixed order; packages differ in their hyphens."""
    squeezed = {style: {name.replace("-", ""): name for name in icons[style]["icons"]} for style in icons}
    for concept in (*CONCEPTS, *UNSEEN_CONCEPTS):
        for style in STYLES:
            yield concept, style, squeezed[style.name][concept.replace("-", "")]


def build(packages: Path, output: Path, size: int = SIZE) -> dict[str, int]:
    """Render every image, ``size`` pixels a side, into ``output``; returns how many each split got."""
    icons = {style.name: read_icons(packages, style.package) for style in STYLES}
    counts: dict[str, int] = {}

    def rows() -> Iterator[tuple[dict[str, str], Image.Image]]:
        for concept, style, name in _names(icons):
            split = split_of(concept, style.name)
            counts[split] = counts.get(split, 0) + 1
            row = {"file_name": f"{split}/{style.name}/{concept}.webp", "text": caption(concept), "concept": concept}
            image = render(svg(icons[style.name], name, style.drawing), style.drawing, size)
            yield {**row, "style": style.name, "split": split}, image

    write_images(output, rows())
    return counts


def write_images(output: Path, rows: Iterable[tuple[dict[str, str], Image.Image]]) -> int:
    """Write images and their rows of ``metadata.jsonl`` into a zip; returns how many."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for row, image in rows:
            data = io.BytesIO()
            image.save(data, "WEBP", lossless=True, method=6)
            archive.writestr(_entry(row["file_name"]), data.getvalue())
            lines.append(json.dumps(row) + "\n")
        archive.writestr(_entry("metadata.jsonl"), "".join(lines), zipfile.ZIP_DEFLATED)
    return len(lines)


def _entry(name: str) -> zipfile.ZipInfo:
    # A fixed date, so that the same packages give the same bytes.
    return zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder @iconify-json with the five packages in it")
    parser.add_argument("output", type=Path, help="the zip to write")
    parser.add_argument("--size", type=int, choices=(64, SIZE), default=SIZE, help="pixels a side")
    arguments = parser.parse_args()
    counts = build(arguments.packages, arguments.output, arguments.size)
    print(f"{arguments.output}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
