"""Read the bundled emoji images into memory: one uint8 tensor and its captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ipadapter_trainer.demo import emoji as demo

from .build import STYLES
from .concepts import CONCEPTS, PROMPT_IMAGES

Split = Literal["train", "held_out", "unseen"]
STYLE_NAMES = tuple(style.name for style in STYLES)


@dataclass(frozen=True)
class EmojiImages(demo.EmojiImages):
    """Images of one split, in the styles of the next model."""

    style_names = STYLE_NAMES


def load_images(file: Path, split: Split) -> EmojiImages:
    """Decode one split of ``pictures.zip`` (half a second for 900 images).

    Raises ValueError when the split has none.
    """
    return EmojiImages(**vars(demo.load_images(file, split)))


@dataclass(frozen=True)
class Drawings:
    """What the parts that must know new drawings learn from: ``images`` uint8 [N, 3, H, W], the index of each one's
    concept in ``labels`` (``CONCEPTS`` first), and of its style, -1 when it is none of the five.
    """

    images: Tensor
    labels: tuple[str, ...]
    concept_ids: Tensor
    style_ids: Tensor

    def sampler(self, batch_size: int, device: torch.device) -> Callable[[torch.Generator], Tensor]:
        """A function that draws the rows of a batch [B]; the first half are of the known concepts.

        It never waits for ``device``, so it can be part of a CUDA graph.
        """
        half, known = batch_size // 2, (self.concept_ids < len(CONCEPTS)).nonzero()[:, 0].to(device)

        def draw(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(self.images), (batch_size,), generator=generator, device=device)
            rows[:half] = known[rows[:half] % len(known)]
            return rows

        return draw


def load_drawings(train: EmojiImages, file: Path | None) -> Drawings:
    """The training images, and those of ``drawings.zip`` when there is one."""
    images, concepts, styles = [train.images], list(train.concepts), list(train.styles)
    if file is not None:
        more = demo.load_images(file, "train")
        images.append(more.images)
        concepts += more.concepts
        styles += more.styles
    labels = (*CONCEPTS, *sorted(set(concepts) - set(CONCEPTS)))
    index = {concept: number for number, concept in enumerate(labels)}
    return Drawings(
        images=torch.cat(images),
        labels=labels,
        concept_ids=torch.tensor([index[concept] for concept in concepts]),
        style_ids=torch.tensor([STYLE_NAMES.index(style) if style else -1 for style in styles]),
    )


def save_prompts(file: Path, folder: Path) -> None:
    """Write the held-out ``PROMPT_IMAGES`` of ``pictures.zip`` as PNG, for hosts without the whole of it."""
    held_out = load_images(file, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    for concept, style in PROMPT_IMAGES:
        pixels = held_out.images[held_out.find(concept, style)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{concept}_{style}.png", optimize=True)
