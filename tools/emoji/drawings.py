"""Draw every icon of every package: more drawings than the emoji world has, for the parts that must know new ones.

    npm install --prefix icons @iconify-json/emojione-v1 @iconify-json/fluent-emoji-flat @iconify-json/fxemoji \
        @iconify-json/openmoji @iconify-json/streamline-emojis
    python -m tools.emoji.drawings icons/node_modules/@iconify-json pictures.zip drawings.zip

A thousand images are too few to learn what a drawing shows or how it is drawn: they are soon known by heart. These
are for the image encoder, its teacher, the judges and the alignment. The UNet and the adapters learn only
from those whose licence is not share-alike; the plus adapter's projector, which is first trained with the image
encoder, has seen all.
Nothing that is kept from training is among them: no concept that is unseen, no concept in the style that is held out
for it, nor by the same designers, and no near copy of an image that is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ipadapter_trainer.demo.emoji import Split, load_images

from .build import STYLES, Drawing, Style, draw_number, read_icons, render, split_of, svg, write_images
from .concepts import CONCEPTS, UNSEEN_CONCEPTS

DESIGNERS = {
    "emojione": "emojione",
    "emojione-v1": "emojione",
    "fluent-emoji": "fluent",
    "fluent-emoji-flat": "fluent",
    "fxemoji": "fxemoji",
    "noto": "noto",
    "noto-v1": "noto",
    "openmoji": "openmoji",
    "streamline-emojis": "streamline",
    "twemoji": "twemoji",
}
SHARE_ALIKE = ("emojione-v1", "openmoji")  # CC BY-SA 4.0
FEWEST = 4  # packages that have a concept; below, names differ too much to say what is the same
NEAR = 0.06  # mean absolute difference of colours in 0..1 at 16 x 16 pixels, over the ink of both


@dataclass(frozen=True)
class Icon:
    """One icon, and how to draw it; ``style`` is "" when none of the five styles looks like that."""

    concept: str
    package: str
    name: str
    drawing: Drawing
    style: str


def list_icons(packages: dict[str, set[str]]) -> Iterator[Icon]:
    """The drawings of every concept that ``FEWEST`` packages have, in a fixed order; packages differ in hyphens."""
    known = {concept.replace("-", ""): concept for concept in (*CONCEPTS, *UNSEEN_CONCEPTS)}
    found: dict[str, dict[str, str]] = {}
    for package in sorted(packages):
        for name in sorted(packages[package]):
            if "skin-tone" not in name:
                found.setdefault(name.replace("-", ""), {})[package] = name
    plain = {style.package: style.name for style in STYLES if style.drawing == "plain"}
    for squeezed, names in sorted(found.items()):
        if len(names) < FEWEST:
            continue
        concept = known.get(squeezed, next(iter(names.values())))
        for package, name in names.items():
            yield Icon(concept, package, name, "plain", plain.get(package, ""))
            drawings: tuple[Drawing, ...] = ("comic", "pixel")
            if concept not in known.values():  # of the others, one is enough
                drawings = drawings[draw_number(concept + package, "drawing", 2) :][:1]
            for drawing in drawings:
                yield Icon(concept, package, name, drawing, drawing)


def kept_style(concept: str) -> Style | None:
    """The style in which a known concept is held out."""
    return next((style for style in STYLES if split_of(concept, style.name) == "held_out"), None)


def may_train(icon: Icon) -> bool:
    """Whether an icon may be seen in training."""
    if icon.concept in UNSEEN_CONCEPTS:
        return False
    if icon.concept not in CONCEPTS:
        return True
    kept = kept_style(icon.concept)
    return kept is None or (
        DESIGNERS[icon.package] != DESIGNERS[kept.package] and (icon.drawing == "plain" or icon.drawing != kept.drawing)
    )


class NearCopies:
    """Finds near copies of the images that are kept from training, mirrored ones too."""

    def __init__(self, images: Path) -> None:
        splits: tuple[Split, ...] = ("held_out", "unseen")
        kept = [image for split in splits for image in load_images(images, split).images.permute(0, 2, 3, 1).numpy()]
        small = np.stack([_small(Image.fromarray(image)) for image in kept])
        self.kept = np.concatenate([small, small[:, :, ::-1]])

    def __contains__(self, image: Image.Image) -> bool:
        small = _small(image)
        ink = np.minimum(self.kept, small).min(axis=-1) < 0.94
        difference = np.abs(self.kept - small).mean(axis=-1)
        return bool(((difference * ink).sum((1, 2)) / ink.sum((1, 2)).clip(min=1)).min() < NEAR)


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32) / 255


def draw(packages: Path, images: Path, output: Path) -> tuple[int, int]:
    """Write the drawings into ``output``; returns how many there are, and how many near copies were left out."""
    icons = {package: read_icons(packages, package) for package in DESIGNERS}
    size = load_images(images, "held_out").size
    near_copies, left_out = NearCopies(images), 0

    def rows() -> Iterator[tuple[dict[str, str], Image.Image]]:
        nonlocal left_out
        for icon in list_icons({package: set(content["icons"]) for package, content in icons.items()}):
            if not may_train(icon):
                continue
            image = render(svg(icons[icon.package], icon.name, icon.drawing), icon.drawing, size)
            if image in near_copies:
                left_out += 1
                continue
            row = {"file_name": f"{icon.package}/{icon.drawing}/{icon.name}.webp", "text": icon.concept}
            split = "share_alike" if icon.package in SHARE_ALIKE else "train"
            yield {**row, "concept": icon.concept, "style": icon.style, "split": split}, image

    return write_images(output, rows()), left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder @iconify-json with all packages in it")
    parser.add_argument("images", type=Path, help="pictures.zip of tools.emoji.build")
    parser.add_argument("output", type=Path, help="the zip to write")
    arguments = parser.parse_args()
    count, left_out = draw(arguments.packages, arguments.images, arguments.output)
    print(f"{arguments.output}: {count} drawings; {left_out} near copies of images kept from training were left out")


if __name__ == "__main__":
    main()
