"""Read the bundled emoji images into memory: one uint8 tensor and its captions."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

Split = Literal["train", "held_out", "unseen", "share_alike"]  # what each holds: tools/emoji/build.py, drawings.py
STYLE_NAMES = ("fluent", "noto", "twemoji", "comic", "pixel")  # one icon package each
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


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

    def subset(self, rows: Sequence[int]) -> Self:
        """Only these images, in this order."""
        return replace(
            self,
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
        files = (io.BytesIO(archive.read(row["file_name"])) for row in rows)
        # Named, for Pillow would try a number of other formats before WebP.
        images = [np.asarray(Image.open(file, formats=("WEBP", "PNG")).convert("RGB")) for file in files]
    return EmojiImages(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        captions=tuple(row["text"] for row in rows),
        concepts=tuple(row["concept"] for row in rows),
        styles=tuple(row["style"] for row in rows),
    )


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1], the range of the VAE."""
    return images.float() / 127.5 - 1.0


def caption(concept: str) -> str:
    """Turn an icon name into words: "victory-hand" -> "victory hand"."""
    return concept.replace("-", " ")


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] or float in [-1, 1] -> CLIP's normalised ``pixel_values``."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else (images + 1) / 2
    mean, std = _mean_and_std(images.device)
    return (unit - mean) / std


@cache  # a copy to a GPU would wait for it
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return mean, std


def styled_caption(caption: str, style: str, colours: str = "") -> str:
    """The caption that also says how: "victory hand, noto style, yellow"; without what is empty.

    The colours come last: a causal text encoder then gives all that is before them the states that it always has.
    """
    return ", ".join(part for part in (caption, style and f"{style} style", colours) if part)
