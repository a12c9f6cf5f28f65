"""Build the emoji images from the Iconify packages: render, caption, split, write one zip.

    npm install --prefix icons @iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat \
        @iconify-json/noto @iconify-json/twemoji @iconify-json/fxemoji
    python -m tools.shipped_emoji.build icons/node_modules/@iconify-json assets/emoji/pictures.zip

The zip holds ``metadata.jsonl`` (imagefolder rows: file_name, text, concept, style, split) and one lossless WebP
an image.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ipadapter_trainer.demo.emoji import TEXT_CONCEPTS, caption, load_images

from .concepts import PROMPT_IMAGES

SIZE = 64


@dataclass(frozen=True)
class Style:
    """A style is one icon package: ``name`` is the word in captions, ``author`` and ``licence`` the attribution."""

    name: str
    package: str
    author: str
    licence: str


STYLES = (
    Style("fluent", "fluent-emoji", "Microsoft Corporation", "MIT"),
    Style("flat", "fluent-emoji-flat", "Microsoft Corporation", "MIT"),
    Style("noto", "noto", "Google Inc", "Apache-2.0"),
    Style("twemoji", "twemoji", "Twitter, Inc and other contributors", "CC-BY-4.0"),
    Style("fxemoji", "fxemoji", "Mozilla Foundation", "Apache-2.0"),
)
# A concept must exist in all of these; the fifth package names its icons another way and covers fewer.
COMPLETE_STYLES = STYLES[:4]

_SKIN_TONE = re.compile(r"skin-tone|(^|-)(light|medium|dark)-skin")
_TWINS = (  # names that differ only by these words look alike, so they must fall on the same side of the split
    (re.compile(r"^(man|woman|men|women|person|people|boy|girl|mrs|mx)-|-(man|woman|men|women)$"), ""),
    (re.compile(r"^(red|orange|yellow|green|blue|light-blue|purple|brown|black|white|grey|pink)-"), ""),
    (re.compile(r"(^|-)(left|right|up|down|leftwards|rightwards|upwards|downwards)(-|$)"), "-"),
    (re.compile(r"^[a-z]+-(oclock|thirty)$"), "clock"),
    (re.compile(r"^keycap-.*"), "keycap"),
)


def twin_group(concept: str) -> str:
    """Return the group that ``concept`` shares with its look-alikes ("blue-heart" and "red-heart" -> "heart")."""
    for pattern, replacement in _TWINS:
        concept = pattern.sub(replacement, concept)
    return concept.strip("-") or concept


def is_held_out(concept: str) -> bool:
    """Return whether the concept, its look-alikes and styles are kept from every training: one group in ten."""
    if twin_group(concept) in {twin_group(c) for c in TEXT_CONCEPTS}:
        return False
    return int(hashlib.sha256(twin_group(concept).encode()).hexdigest(), 16) % 10 == 0


def svg(icons: dict[str, Any], name: str) -> str:
    """Wrap the body of an Iconify icon into a standalone SVG document."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render(document: str, size: int = SIZE) -> Image.Image:
    """Render an SVG document on white, centred: a size x size RGB image."""
    import resvg_py  # only the builder needs it

    png = resvg_py.svg_to_bytes(
        svg_string=document, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return ImageOps.pad(image, (size, size), color="white")  # a few icons are not square


def _read_icons(packages: Path) -> dict[str, dict[str, Any]]:
    icons: dict[str, dict[str, Any]] = {}
    for style in STYLES:
        file = packages / style.package / "icons.json"
        if not file.is_file():
            raise SystemExit(f"{file} is missing: npm install @iconify-json/{style.package} first")
        icons[style.name] = json.loads(file.read_text(encoding="utf-8"))
    return icons


def _names(icons: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Style, str]]:
    """Yield (concept, style, icon name in that style's package) in a fixed order."""
    common = set.intersection(*(set(icons[s.name]["icons"]) for s in COMPLETE_STYLES))
    squeezed = {name.replace("-", ""): name for name in icons["fxemoji"]["icons"]}
    for concept in sorted(name for name in common if not _SKIN_TONE.search(name)):
        for style in COMPLETE_STYLES:
            yield concept, style, concept
        if concept.replace("-", "") in squeezed:
            yield concept, STYLES[4], squeezed[concept.replace("-", "")]


def build(packages: Path, output: Path) -> dict[str, int]:
    """Render every image into ``output``; returns how many images each split got."""
    icons = _read_icons(packages)
    rows: list[dict[str, str]] = []
    counts = {"train": 0, "held_out": 0}
    output.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for concept, style, name in _names(icons):
            split = "held_out" if is_held_out(concept) else "train"
            file_name = f"{split}/{style.name}/{concept}.webp"
            image = io.BytesIO()
            render(svg(icons[style.name], name)).save(image, "WEBP", lossless=True, method=4)
            archive.writestr(_entry(file_name), image.getvalue())
            row = {"file_name": file_name, "text": caption(concept), "concept": concept}
            rows.append({**row, "style": style.name, "split": split})
            counts[split] += 1
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        archive.writestr(_entry("metadata.jsonl"), lines, zipfile.ZIP_DEFLATED)
    return counts


def _entry(name: str) -> zipfile.ZipInfo:
    # A fixed date, so that the same packages give the same bytes.
    return zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))


def save_prompts(file: Path, folder: Path) -> None:
    """Write the held-out ``PROMPT_IMAGES`` of ``pictures.zip`` as PNG, for hosts without the whole of it."""
    held_out = load_images(file, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    for concept, style in PROMPT_IMAGES:
        pixels = held_out.images[held_out.find(concept, style)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{concept}_{style}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder @iconify-json with the five packages in it")
    parser.add_argument("output", type=Path, help="the zip to write")
    arguments = parser.parse_args()
    counts = build(arguments.packages, arguments.output)
    print(f"{arguments.output}: {counts['train']} images to train on, {counts['held_out']} held out")


if __name__ == "__main__":
    main()
