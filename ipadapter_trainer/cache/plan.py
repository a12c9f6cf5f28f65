"""Which rows a feature cache has, and how they are dealt to shards. It depends on the data and the settings alone, so
every process, and every resume, makes the same plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.buckets import Buckets
from ..data.examples import Example
from ..data.files import TarMember
from ..data.images import Size, StoredImage
from ..models.base_model import BaseModel
from .settings import RowBytes, Settings, row_bytes

LARGEST_SHARD = 256 * 10**6  # bytes
SMALLEST_SHARD = 16 * 10**6
SHARDS = 64  # wished for, so that there are enough for all processes


@dataclass(frozen=True, eq=False)
class Rows:
    """The distinct captions and other references of a data set, and which of them belong to each example."""

    captions: list[str]  # the empty one first
    caption_of: np.ndarray  # int32 [N]
    references: list[StoredImage]
    references_of: list[tuple[int, ...]]  # empty: the image is its own reference

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Rows:
        """Of the examples in their order."""
        captions = {"": 0}
        references: dict[Path | TarMember | int, int] = {}  # images in memory by their id
        images: list[StoredImage] = []
        caption_of = np.empty(len(examples), dtype=np.int32)
        references_of: list[tuple[int, ...]] = []
        for row, example in enumerate(examples):
            caption_of[row] = captions.setdefault(example.text, len(captions))
            numbers: list[int] = []
            for reference in example.references:
                key = id(reference) if isinstance(reference, Image.Image) else reference
                if key not in references:
                    references[key] = len(references)
                    images.append(reference)
                numbers.append(references[key])
            references_of.append(tuple(numbers))
        return cls(list(captions), caption_of, images, references_of)


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows `start` to `stop` of a table. `items` are the numbers of their captions, references or examples."""

    table: str
    number: int
    start: int
    items: np.ndarray
    key: str  # of the settings and the rows: another cache's shard has another
    size: Size | None = None  # of images
    own: bool = False  # images that are their own reference

    @property
    def stop(self) -> int:
        """One after the last row."""
        return self.start + len(self.items)

    @property
    def file(self) -> str:
        """Relative to the cache's folder."""
        return f"{self.table}/shard-{self.number:05d}.safetensors"


@dataclass(frozen=True, eq=False)
class Plan:
    """All shards of a cache, by table."""

    shards: dict[str, list[Shard]]
    bytes: dict[str, int]  # forecast

    def __iter__(self) -> Iterator[Shard]:
        return (shard for shards in self.shards.values() for shard in shards)


def make_plan(settings: Settings, base_model: BaseModel, rows: Rows, buckets: Buckets, dtype_bytes: int = 2) -> Plan:
    """Deal the rows of all tables to shards of at most `LARGEST_SHARD` bytes.

    The images of a shard belong to one bucket and have the same tensors.
    """
    row = row_bytes(settings, base_model, None, dtype_bytes)
    encoded = settings.image_feature is not None
    texts = _Dealer(settings, "texts", len(rows.captions) * row.text)
    texts.deal(np.arange(len(rows.captions)), row.text)
    references = _Dealer(settings, "references", len(rows.references) * row.reference)
    if encoded:
        references.deal(np.arange(len(rows.references)), row.reference)
    groups = list(_image_groups(settings, rows, buckets))
    sizes = [_image_bytes(row_bytes(settings, base_model, size, dtype_bytes), own) for _, size, own in groups]
    images = _Dealer(settings, "images", sum(len(g[0]) * s for g, s in zip(groups, sizes, strict=True)))
    for (items, size, own), each in zip(groups, sizes, strict=True):
        images.deal(items, each, size, own)
    dealers = (texts, references, images)
    return Plan({d.table: d.shards for d in dealers}, {d.table: d.bytes for d in dealers})


def _image_groups(settings: Settings, rows: Rows, buckets: Buckets) -> Iterator[tuple[np.ndarray, Size, bool]]:
    alone = np.array([not references for references in rows.references_of])
    with_own = alone | settings.own_references if settings.image_feature is not None else alone & False
    for size, bucket in zip(buckets.sizes, buckets.rows, strict=True):
        items = np.array(bucket)
        for own in (True, False):
            chosen = items[with_own[items] == own]
            if len(chosen):
                yield chosen, size, own


def _image_bytes(row: RowBytes, own: bool) -> int:
    return row.image + (row.own if own else 0)


class _Dealer:
    """Cuts the rows of a table into shards, one group of like rows after the other."""

    def __init__(self, settings: Settings, table: str, total: int) -> None:
        self.table = table
        self.shards: list[Shard] = []
        self.bytes = 0
        self._start = 0
        self._settings = repr(sorted(asdict(settings).items()))
        self._target = min(max(total // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)

    def deal(self, items: np.ndarray, row_bytes: int, size: Size | None = None, own: bool = False) -> None:
        each = max(1, self._target // row_bytes)
        for first in range(0, len(items), each):
            part = items[first : first + each]
            what = f"{self._settings}/{self.table}/{size}/{own}/".encode() + part.astype("<i8").tobytes()
            key = hashlib.sha256(what).hexdigest()[:32]
            self.shards.append(Shard(self.table, len(self.shards), self._start, part, key, size, own))
            self._start += len(part)
            self.bytes += len(part) * row_bytes
