"""Images that are in a data set more than once: the same bytes, or nearly the same pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import TypeVar

from PIL import Image, ImageStat

_BITS, _BANDS = 64, 4
_NEAR = _BANDS - 1  # hashes that differ in at most so many bits agree in one of the bands
_COLOUR_STEP = 8

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ImageHash:
    """What an image looks like: a perceptual hash of 64 bits, which is blind to colour, and the mean colour."""

    hash: int
    colour: tuple[int, ...]

    def like(self, other: ImageHash) -> bool:
        """Whether the two are nearly the same: resized, compressed or retouched."""
        near = (self.hash ^ other.hash).bit_count() <= _NEAR
        return near and all(abs(a - b) <= 1 for a, b in zip(self.colour, other.colour, strict=True))


def can_hash_images() -> bool:
    """Whether the library for `image_hash` is installed."""
    return find_spec("imagehash") is not None


def image_hash(image: Image.Image) -> ImageHash:
    """The look of an RGB image, or of its thumbnail, with imagehash's pHash."""
    import imagehash

    return ImageHash(
        int(str(imagehash.phash(image)), 16),
        tuple(int(mean) // _COLOUR_STEP for mean in ImageStat.Stat(image).mean),
    )


def same(keys: Iterable[tuple[str, Hashable]]) -> list[list[str]]:
    """Names with equal keys, in groups of at least two."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, key in keys:
        groups[key].append(name)
    return [names for names in groups.values() if len(names) > 1]


def near_duplicates(looks: Iterable[tuple[str, ImageHash]]) -> list[list[str]]:
    """Names of images that look alike, in groups of at least two; each is like some other one of its group."""
    names: dict[ImageHash, list[str]] = defaultdict(list)
    for name, look in looks:
        names[look].append(name)
    groups = _connected(list(names))
    found = [[name for look in group for name in names[look]] for group in groups]
    return [group for group in found if len(group) > 1]


def _connected(looks: Sequence[ImageHash]) -> list[list[ImageHash]]:
    """Group looks by chains of likeness."""
    leader = list(range(len(looks)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    width = _BITS // _BANDS
    for band in range(_BANDS):
        candidates: dict[int, list[int]] = defaultdict(list)
        for i, look in enumerate(looks):
            candidates[look.hash >> band * width & (1 << width) - 1].append(i)
        for rows in candidates.values():
            for i, j in combinations(rows, 2):
                if looks[i].like(looks[j]):
                    leader[find(j)] = find(i)
    groups: dict[int, list[ImageHash]] = defaultdict(list)
    for i, look in enumerate(looks):
        groups[find(i)].append(look)
    return list(groups.values())
