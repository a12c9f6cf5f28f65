"""Images that are in a data set more than once: the same bytes, or nearly the same pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations

from PIL import Image, ImageStat

_BANDS, _BAND_BITS = 4, 16
_NEAR = _BANDS - 1  # bits; hashes that differ in so few agree in at least one band
_COLOUR_STEP = 8


@dataclass(frozen=True)
class ImageHash:
    """A perceptual hash of 64 bits, which ignores colour, and the mean colour."""

    hash: int
    colour: tuple[int, ...]

    def is_near(self, other: ImageHash) -> bool:
        """Whether the images are nearly the same: resized, compressed or retouched."""
        near = (self.hash ^ other.hash).bit_count() <= _NEAR
        return near and all(abs(a - b) <= 1 for a, b in zip(self.colour, other.colour, strict=True))


def can_hash_images() -> bool:
    """Whether imagehash, which `image_hash` uses, is installed."""
    return find_spec("imagehash") is not None


def image_hash(image: Image.Image) -> ImageHash:
    """The hash of an RGB image, or of its thumbnail, with imagehash's pHash."""
    import imagehash

    colour = tuple(int(mean) // _COLOUR_STEP for mean in ImageStat.Stat(image).mean)
    return ImageHash(int(str(imagehash.phash(image)), 16), colour)


def duplicates(keys: Iterable[tuple[str, Hashable]]) -> list[list[str]]:
    """Names with equal keys, in groups of at least two."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, key in keys:
        groups[key].append(name)
    return [names for names in groups.values() if len(names) > 1]


def near_duplicates(hashes: Iterable[tuple[str, ImageHash]]) -> list[list[str]]:
    """Names of images that are nearly the same, in groups of at least two; each is near another one of its group."""
    hashes = list(hashes)
    group_of = {key: [key] for _, key in hashes}
    for band in range(_BANDS):
        candidates: dict[int, list[ImageHash]] = defaultdict(list)
        for key in group_of:
            candidates[key.hash >> band * _BAND_BITS & (1 << _BAND_BITS) - 1].append(key)
        for one, other in (pair for keys in candidates.values() for pair in combinations(keys, 2)):
            if group_of[one] is not group_of[other] and one.is_near(other):
                small, large = sorted((group_of[one], group_of[other]), key=len)
                large += small
                group_of.update(dict.fromkeys(small, large))
    return duplicates((name, id(group_of[key])) for name, key in hashes)
