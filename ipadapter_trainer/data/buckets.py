"""Aspect-ratio buckets, and the order in which batches are drawn from them.

An image goes into the bucket nearest to its shape, and a batch holds images of one bucket, so that little is cut
off (NovelAI, github.com/NovelAI/novelai-aspect-ratio-bucketing; SDXL, arXiv 2307.01952, section 2.3).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from .augmentation import SampleIndex
from .examples import Example
from .images import Size, open_lazily, upright_size

_THREADS = 16  # more than cores: they wait for the disk
SAMPLE = 500  # image headers that are read before the start of a training


@dataclass(frozen=True)
class Buckets:
    """The sizes (width, height) of the buckets that hold an image, and the rows in each, in rising order."""

    sizes: tuple[Size, ...]
    rows: tuple[Sequence[int], ...]

    @classmethod
    def square(cls, resolution: int, length: int) -> Buckets:
        """A single square bucket."""
        return cls(((resolution, resolution),), (range(length),))

    def __str__(self) -> str:
        counts = (f"{w}x{h} {len(rows):,}" for (w, h), rows in zip(self.sizes, self.rows, strict=True))
        return ", ".join(counts)


def make_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """Every size (width, height) with sides that are multiples of `step` in a ratio of at most `max_ratio`, and the
    largest area up to resolution^2; from tall to wide, including the square.

    Raises ConfigError when the resolution is smaller than a step.
    """
    if resolution < step:
        raise ConfigError(f"resolution = {resolution} is less than bucket_step = {step}. Set bucket_step lower.")
    area, square = resolution**2, resolution // step * step
    tall = ((width, area // width // step * step) for width in range(step, square + 1, step))
    sizes = {(w, h) for w, h in tall if h <= max_ratio * w} | {(square, square)}
    return tuple(sorted(sizes | {(h, w) for w, h in sizes}, key=lambda size: (size[0] / size[1], size)))


def read_sizes(examples: Sequence[Example], *, progress_bar: bool = False) -> list[Size | None]:
    """The upright size of every image, from the list or from the file's header; None for an unreadable file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = pool.map(_read_size, examples)
        return list(tqdm(sizes, "image sizes", len(examples), disable=not progress_bar))


def sample_sizes(examples: Sequence[Example], count: int = SAMPLE) -> list[Size | None]:
    """The sizes of at most `count` examples, always of the same ones."""
    return read_sizes(examples if len(examples) <= count else random.Random(0).sample(examples, count))


def _read_size(example: Example) -> Size | None:
    if example.size is not None:
        return example.size
    if isinstance(example.image, Image.Image):
        return upright_size(example.image)
    try:
        with open_lazily(example.image) as image:
            return upright_size(image)
    except Exception:  # Pillow raises nearly anything on damaged files; the data set reports them
        return None


def assign(sizes: Sequence[Size | None], buckets: Sequence[Size], at_least: int = 1) -> Buckets:
    """Sort images into the buckets with the nearest ratio of sides. Unknown sizes go into the fullest bucket.

    Buckets with fewer than `at_least` images are dropped, the emptiest first, and their images go to the next nearest.
    Set it to the batch size: a bucket that cannot fill a batch repeats its images.
    """
    if not sizes:
        raise DataError("No images to sort into buckets.")
    if all(size is None for size in sizes):
        sizes = [(1, 1)] * len(sizes)
    known = np.array([size is not None for size in sizes])
    ratios = np.log([size[0] / size[1] for size in sizes if size is not None])
    left = list(buckets)
    while True:
        log_ratios = np.log([w / h for w, h in left])
        nearest = np.searchsorted((log_ratios[1:] + log_ratios[:-1]) / 2, ratios)
        counts = np.bincount(nearest, minlength=len(left))
        filled = np.flatnonzero(counts)
        emptiest = filled[counts[filled].argmin()]
        if counts[emptiest] >= at_least or len(filled) == 1:
            break
        left = [left[i] for i in filled if i != emptiest]
    bucket_of = np.full(len(sizes), counts.argmax())
    bucket_of[known] = nearest
    return Buckets(
        sizes=tuple(left[i] for i in filled),
        rows=tuple(tuple(np.flatnonzero(bucket_of == i).tolist()) for i in filled),
    )


def size_notes(
    sizes: Sequence[Size | None], images: int, resolution: int, bucket_step: int | None = None, batch_size: int = 1
) -> list[str]:
    """Warnings about images that are scaled up, and about buckets that cannot fill a batch.

    `sizes` are those of all `images` or of a sample. Without `bucket_step` images are cropped to a square.
    """
    known = [size for size in sizes if size is not None]
    if not known:
        return []
    buckets = assign(
        known, [(resolution, resolution)] if bucket_step is None else make_buckets(resolution, bucket_step)
    )
    small = sum(
        known[row][0] < width or known[row][1] < height
        for (width, height), rows in zip(buckets.sizes, buckets.rows, strict=True)
        for row in rows
    )
    scale = images / len(sizes)  # 1 unless they are a sample
    notes: list[str] = []
    if small:
        target = f"{resolution}x{resolution} pixels" if bucket_step is None else "their bucket"
        found = f"{small:,} of {images:,} images"
        if scale > 1:
            found = f"about {small * scale:,.0f} of {images:,} images ({small:,} of a sample of {len(sizes):,})"
        notes.append(f"Smaller than {target}, so scaled up and blurred: {found}.")
    few = sum(len(rows) * scale < batch_size for rows in buckets.rows)
    if bucket_step is not None and few and len(buckets.rows) > 1:
        sample = f", estimated from a sample of {len(sizes):,}" if scale > 1 else ""
        notes.append(
            f"Buckets with fewer images than a batch of {batch_size}: {few} of {len(buckets.rows)}{sample}; their "
            "images go to the next nearest bucket."
        )
    return notes


class BucketBatchSampler(Sampler[list[SampleIndex]]):
    """Endless global batches, epoch after epoch, starting at batch number `start`.

    In each epoch the rows of each bucket are shuffled and cut into batches; the last one is filled up with rows from
    the start of that order. Then the batches of all buckets are shuffled. With a single bucket this is a plain shuffle.
    """

    def __init__(self, bucket_rows: Sequence[Sequence[int]], global_batch: int, seed: int, start: int = 0) -> None:
        self.global_batch = global_batch
        self.start = start
        self._rows = [torch.tensor(rows) for rows in bucket_rows]
        self._seed = seed
        # (bucket, number within the bucket) of every batch of an epoch
        self._batches = [
            (bucket, number)
            for bucket, rows in enumerate(self._rows)
            for number in range(-(-len(rows) // global_batch))
        ]

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self._batches)

    def starting_at(self, start: int) -> BucketBatchSampler:
        """The same batches from another number on."""
        other = copy(self)
        other.start = start
        return other

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        epoch, skip = divmod(self.start, self.per_epoch)
        while True:
            orders = [rows[self._permutation(len(rows), epoch, bucket)] for bucket, rows in enumerate(self._rows)]
            for batch in self._permutation(self.per_epoch, epoch, "batches")[skip:].tolist():
                bucket, number = self._batches[batch]
                yield self._batch(epoch, orders[bucket], number)
            epoch, skip = epoch + 1, 0

    def _batch(self, epoch: int, order: Tensor, number: int) -> list[SampleIndex]:
        positions = range(number * self.global_batch, (number + 1) * self.global_batch)
        rows = order[[position % len(order) for position in positions]].tolist()
        return [SampleIndex(epoch, row, position // len(order)) for row, position in zip(rows, positions, strict=True)]

    def _permutation(self, length: int, epoch: int, name: int | str) -> Tensor:
        seed = random.Random(f"{self._seed}/{epoch}/order/{name}").getrandbits(63)
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
