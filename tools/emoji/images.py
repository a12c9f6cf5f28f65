"""Read the bundled emoji images into memory: one uint8 tensor and its captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ipadapter_trainer.demo import emoji as demo

from .build import STYLES
from .concepts import PROMPT_IMAGES

Split = Literal["train", "held_out", "unseen"]
STYLE_NAMES = tuple(style.name for style in STYLES)


@dataclass(frozen=True)
class EmojiImages(demo.EmojiImages):
    """Images of one split, in the styles of the next model."""

    style_names = STYLE_NAMES

    @property
    def size(self) -> int:
        """Pixels a side; every part of the model follows it."""
        return self.images.shape[-1]


def load_images(file: Path, split: Split) -> EmojiImages:
    """Decode one split of ``pictures.zip`` (about a second for 2,000 images).

    Raises ValueError when the split has none.
    """
    return EmojiImages(**vars(demo.load_images(file, split)))


def save_prompts(file: Path, folder: Path) -> None:
    """Write the held-out ``PROMPT_IMAGES`` of ``pictures.zip`` as PNG, for hosts without the whole of it."""
    held_out = load_images(file, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    for concept, style in PROMPT_IMAGES:
        pixels = held_out.images[held_out.find(concept, style)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{concept}_{style}.png", optimize=True)
