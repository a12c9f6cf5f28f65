"""What the frozen models are shown for a feature cache, prepared by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.augmentation import Augmentation, CropParams, crop_params
from ..data.examples import Example
from ..data.images import Size, StoredImage, why_unreadable
from ..data.preprocess import Preprocessor, image_tensors, open_image, reference_tensor

Item = tuple[int, Size | None, bool]  # number, bucket, whether the image is its own reference


def views(augmentation: Augmentation, place: int | str, variants: int) -> Iterator[CropParams]:
    """What the variants of a row see: crop number v is that of its use in epoch v; with flips, plain and mirrored."""
    flips = 2 if augmentation.flip else 1
    for variant in range(variants):
        where = crop_params(augmentation, (augmentation.seed, variant // flips, place))
        yield replace(where, flip=variant % flips == 1, own_reference=True)


def reference_place(number: int) -> str:
    """The address of a reference's crops, which rows share."""
    return f"reference {number}"


class ImageViews(Dataset[dict[str, Any]]):
    """`images` [V, 3, H, W] and sizes of examples and, where they are their own reference, `clip_images`."""

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessor: Preprocessor,
        augmentation: Augmentation,
        latent_variants: int,
        own_variants: int,
    ) -> None:
        self._examples = examples
        self._preprocessor = preprocessor
        self._augmentation = augmentation
        self._latent_variants, self._own_variants = latent_variants, own_variants

    def __getitem__(self, item: Item) -> dict[str, Any]:
        row, size, own = item
        assert size is not None
        try:
            return {**self._tensors(row, size, own), "broken": ""}
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            blank = Image.new("RGB", size)
            return {**self._tensors(row, size, own, blank), "broken": reason(self._examples[row].name, error)}

    def _tensors(self, row: int, size: Size, own: bool, instead: Image.Image | None = None) -> dict[str, Tensor]:
        preprocessor = self._preprocessor if own else replace(self._preprocessor, image_processor=None)
        opened = open_image(self._preprocessor, self._augmentation, size, instead or self._examples[row].image)
        variants = max(self._latent_variants, self._own_variants if own else 0)
        seen = [
            image_tensors(preprocessor, self._augmentation, size, where, opened)
            for where in views(self._augmentation, row, variants)
        ]
        limits = {"clip_images": self._own_variants}
        return {
            key: torch.stack([tensors[key] for tensors in seen[: limits.get(key, self._latent_variants)]])
            for key in seen[0]
        }


class ReferenceViews(Dataset[dict[str, Any]]):
    """`clip_images` [V, 3, S, S] of images that are other images' references."""

    def __init__(
        self, references: Sequence[StoredImage], preprocessor: Preprocessor, augmentation: Augmentation, variants: int
    ) -> None:
        self._references = references
        self._preprocessor = preprocessor
        self._augmentation = augmentation
        self._variants = variants

    def __getitem__(self, item: Item) -> dict[str, Any]:
        number = item[0]
        image = self._references[number]
        try:
            return {**self._tensors(number, image), "broken": ""}
        except Exception as error:
            name = "a reference in memory" if isinstance(image, Image.Image) else str(image)
            return {**self._tensors(number, Image.new("RGB", (8, 8))), "broken": reason(name, error)}

    def _tensors(self, number: int, image: StoredImage) -> dict[str, Tensor]:
        size = (self._augmentation.resolution, self._augmentation.resolution)
        opened, _ = open_image(self._preprocessor, self._augmentation, size, image)
        seen = views(self._augmentation, reference_place(number), self._variants)
        return {"clip_images": torch.stack([reference_tensor(self._preprocessor, where, opened) for where in seen])}


def reason(name: str, error: Exception) -> str:
    """Why an image is left out."""
    return f"{name}: {why_unreadable(error)}"


def stack(items: Sequence[dict[str, Any]]) -> dict[str, Tensor | list[str]]:
    """Rows as a batch."""
    return {
        key: [item[key] for item in items] if key == "broken" else torch.stack([item[key] for item in items])
        for key in items[0]
    }
