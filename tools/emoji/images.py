"""Read the bundled emoji images into memory: one uint8 tensor and its captions."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .build import STYLES
from .concepts import PROMPT_IMAGES

Split = Literal["train", "held_out", "unseen"]
STYLE_NAMES = tuple(style.name for style in STYLES)


@dataclass(frozen=True)
class EmojiImages:
    """Images of one split. ``images`` is uint8 [N, 3, H, W]; the three tuples have one entry an image."""

    images: Tensor
    captions: tuple[str, ...]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def size(self) -> int:
        """Pixels a side; every part of the model follows it."""
        return self.images.shape[-1]

    @property
    def style_ids(self) -> Tensor:
        """int64 [N]: the index of each image's style in ``STYLE_NAMES``."""
        return torch.tensor([STYLE_NAMES.index(style) for style in self.styles])

    def subset(self, rows: Sequence[int]) -> EmojiImages:
        """Only these images, in this order."""
        return EmojiImages(
            images=self.images[list(rows)],
            captions=tuple(self.captions[row] for row in rows),
            concepts=tuple(self.concepts[row] for row in rows),
            styles=tuple(self.styles[row] for row in rows),
        )

    def find(self, concept: str, style: str) -> int:
        """Return the index of a concept drawn in a style; KeyError names both if there is none."""
        for index, pair in enumerate(zip(self.concepts, self.styles, strict=True)):
            if pair == (concept, style):
                return index
        raise KeyError(f"no image of {concept!r} in style {style!r} among {len(self)} images")


def load_images(file: Path, split: Split) -> EmojiImages:
    """Decode one split of ``pictures.zip`` (about a second for 2,000 images).

    Raises ValueError when the split has none.
    """
    with zipfile.ZipFile(file) as archive:
        every = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        rows = [row for row in every if row["split"] == split]
        if not rows:
            raise ValueError(f"{file}: no images in split {split!r} ({len(every)} in all). Build the zip again.")
        images = [np.asarray(Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGB")) for row in rows]
    return EmojiImages(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        captions=tuple(row["text"] for row in rows),
        concepts=tuple(row["concept"] for row in rows),
        styles=tuple(row["style"] for row in rows),
    )


def save_prompts(file: Path, folder: Path) -> None:
    """Write the held-out ``PROMPT_IMAGES`` of ``pictures.zip`` as PNG, for hosts without the whole of it."""
    held_out = load_images(file, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    for concept, style in PROMPT_IMAGES:
        pixels = held_out.images[held_out.find(concept, style)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{concept}_{style}.png", optimize=True)
