"""What the frozen models are shown for a feature cache, prepared by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.augmentation import Geometry, Recipe, geometry
from ..data.examples import Example
from ..data.images import Size, Stored, why_broken
from ..data.preprocess import Encoding, open_picture, picture_tensors, reference_tensor

Item = tuple[int, Size | None, bool]  # number, bucket, whether the picture is its own reference


def views(recipe: Recipe, place: int | str, variants: int) -> Iterator[Geometry]:
    """What the variants of a row see: crop number v is that of its use in epoch v; with flips, plain and mirrored."""
    flips = 2 if recipe.flip else 1
    for variant in range(variants):
        where = geometry(recipe, (recipe.seed, variant // flips, place))
        yield replace(where, flip=variant % flips == 1, own_reference=True)


def reference_place(number: int) -> str:
    """The address of a reference's crops, which rows share."""
    return f"reference {number}"


class PictureViews(Dataset[dict[str, Any]]):
    """`images` [V, 3, H, W] and sizes of examples and, where they are their own reference, `clip_images`."""

    def __init__(
        self, examples: Sequence[Example], encoding: Encoding, recipe: Recipe, latent_variants: int, own_variants: int
    ) -> None:
        self._examples = examples
        self._encoding = encoding
        self._recipe = recipe
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
        encoding = self._encoding if own else replace(self._encoding, image_processor=None)
        opened = open_picture(self._encoding, self._recipe, size, instead or self._examples[row].image)
        variants = max(self._latent_variants, self._own_variants if own else 0)
        seen = [
            picture_tensors(encoding, self._recipe, size, where, opened) for where in views(self._recipe, row, variants)
        ]
        limits = {"clip_images": self._own_variants}
        return {
            key: torch.stack([tensors[key] for tensors in seen[: limits.get(key, self._latent_variants)]])
            for key in seen[0]
        }


class ReferenceViews(Dataset[dict[str, Any]]):
    """`clip_images` [V, 3, S, S] of pictures that are other pictures' references."""

    def __init__(self, references: Sequence[Stored], encoding: Encoding, recipe: Recipe, variants: int) -> None:
        self._references = references
        self._encoding = encoding
        self._recipe = recipe
        self._variants = variants

    def __getitem__(self, item: Item) -> dict[str, Any]:
        number = item[0]
        picture = self._references[number]
        try:
            return {**self._tensors(number, picture), "broken": ""}
        except Exception as error:
            name = "a reference in memory" if isinstance(picture, Image.Image) else str(picture)
            return {**self._tensors(number, Image.new("RGB", (8, 8))), "broken": reason(name, error)}

    def _tensors(self, number: int, picture: Stored) -> dict[str, Tensor]:
        size = (self._recipe.resolution, self._recipe.resolution)
        opened, _ = open_picture(self._encoding, self._recipe, size, picture)
        seen = views(self._recipe, reference_place(number), self._variants)
        return {"clip_images": torch.stack([reference_tensor(self._encoding, where, opened) for where in seen])}


def reason(name: str, error: Exception) -> str:
    """Why a picture is left out."""
    return f"{name}: {why_broken(error)}"


def stack(items: Sequence[dict[str, Any]]) -> dict[str, Tensor | list[str]]:
    """Rows as a batch."""
    return {
        key: [item[key] for item in items] if key == "broken" else torch.stack([item[key] for item in items])
        for key in items[0]
    }
