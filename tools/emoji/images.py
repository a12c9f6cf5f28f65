"""The drawings that some parts learn from beside the images, and the image prompts that are shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, caption, load_images

from .concepts import CONCEPTS, PROMPT_IMAGES


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
        """A function that draws the rows of a batch [B]; every other one is of a known concept.

        It never waits for ``device``, so it can be part of a CUDA graph.
        """
        known = (self.concept_ids < len(CONCEPTS)).nonzero()[:, 0].to(device)

        def draw(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(self.images), (batch_size,), generator=generator, device=device)
            rows[::2] = known[rows[::2] % len(known)]
            return rows

        return draw


def load_drawings(train: EmojiImages, file: Path | None) -> Drawings:
    """The training images, and all of ``drawings.zip`` when there is one."""
    images, concepts, styles = [train.images], list(train.concepts), list(train.styles)
    if file is not None:
        for split in ("train", "share_alike"):
            more = load_images(file, split)
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


def load_more_images(train: EmojiImages, file: Path | None) -> tuple[EmojiImages, EmojiImages]:
    """What the UNet and the adapters learn from: images of the known concepts, and about as many of others, whose
    captions are not used. Without ``drawings.zip`` both are the training images.

    Of the known concepts ``drawings.zip`` has more comic and pixel drawings. Share-alike ones are not among them.
    """
    if file is None:
        return train, train
    every = load_images(file, "train")
    known, others = [], []
    for row, (concept, style) in enumerate(zip(every.concepts, every.styles, strict=True)):
        if concept not in CONCEPTS and style:
            others.append(row)
        elif concept in CONCEPTS and style in ("comic", "pixel"):
            known.append(row)
    more = every.subset(known)
    images = EmojiImages(
        images=torch.cat([train.images, more.images]),
        captions=(*train.captions, *map(caption, more.concepts)),
        concepts=(*train.concepts, *more.concepts),
        styles=(*train.styles, *more.styles),
    )
    return images, every.subset(others[:: max(1, len(others) // len(images))])


def save_prompts(file: Path, folder: Path) -> None:
    """Write the held-out ``PROMPT_IMAGES`` of ``pictures.zip`` as PNG, for hosts without the whole of it."""
    held_out = load_images(file, "held_out")
    folder.mkdir(parents=True, exist_ok=True)
    for concept, style in PROMPT_IMAGES:
        pixels = held_out.images[held_out.find(concept, style)].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{concept}_{style}.png", optimize=True)
