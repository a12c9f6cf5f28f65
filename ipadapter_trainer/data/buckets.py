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

_THREADS = 16  # more than cores: opening a file is waiting


@dataclass(frozen=True)
class Buckets:
    """The buckets that hold an image: their sizes (width, height), and the rows of each, in rising order."""

    sizes: tuple[Size, ...]
    rows: tuple[Sequence[int], ...]

    @classmethod
    def square(cls, resolution: int, length: int) -> Buckets:
        """No buckets: every image is cut to a square."""
        return cls(((resolution, resolution),), (range(length),))

    def __str__(self) -> str:
        counts = (f"{w}x{h} {len(rows):,}" for (w, h), rows in zip(self.sizes, self.rows, strict=True))
        return ", ".join(counts)


def find_buckets(
    examples: Sequence[Example],
    resolution: int,
    step: int = 64,
    *,
    max_ratio: float = 2.0,
    at_least: int = 1,
    progress_bar: bool = False,
) -> Buckets:
    """Read the size of every image and sort them into buckets; the arguments as below."""
    buckets = make_buckets(resolution, step, max_ratio)
    return assign(read_sizes(examples, progress_bar=progress_bar), buckets, at_least)


def make_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """Every size (width, height) with sides that are multiples of `step`, an area as near to resolution^2 as possible
    without exceeding it, and sides in a ratio of at most `max_ratio`; from tall to wide, the square among them.

    Raises ConfigError when the resolution is smaller than a step.
    """
    if resolution < step:
        raise ConfigError(f"resolution = {resolution} is less than bucket_step = {step}. Set bucket_step lower.")
    area, square = resolution**2, resolution // step * step
    tall = ((width, area // width // step * step) for width in range(step, square + 1, step))
    sizes = {(w, h) for w, h in tall if h <= max_ratio * w} | {(square, square)}
    return tuple(sorted(sizes | {(h, w) for w, h in sizes}, key=lambda size: (size[0] / size[1], size)))


def read_sizes(examples: Sequence[Example], *, progress_bar: bool = False) -> list[Size | None]:
    """The upright size of every image from its list or its file's header; None where there is none to read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = pool.map(_read_size, examples)
        return list(tqdm(sizes, "image sizes", len(examples), disable=not progress_bar))


def _read_size(example: Example) -> Size | None:
    if example.size is not None:
        return example.size
    if isinstance(example.image, Image.Image):
        return upright_size(example.image)
    try:
        with open_lazily(example.image) as image:
            return upright_size(image)
    except Exception:  # Pillow raises nearly anything on damaged files; the data set names them when it reads them
        return None


def assign(sizes: Sequence[Size | None], buckets: Sequence[Size], at_least: int = 1) -> Buckets:
    """Sort images into the buckets nearest to their shape (the ratio of the sides); None goes into the fullest.

    Buckets with fewer than `at_least` images are given up, the emptiest first, and their images go to the next
    nearest: a batch's size is a good value, since a bucket that cannot fill a batch repeats its images.
    """
    if not sizes:
        raise DataError("No images to sort into buckets.")
    if all(size is None for size in sizes):
        sizes = [(1, 1)] * len(sizes)
    known = np.array([size is not None for size in sizes])
    ratios = np.log([size[0] / size[1] for size in sizes if size is not None])
    left = list(buckets)
    while True:
        nearest = _nearest(ratios, np.log([w / h for w, h in left]))
        counts = np.bincount(nearest, minlength=len(left))
        filled = np.flatnonzero(counts)
        emptiest = filled[counts[filled].argmin()]
        if counts[emptiest] >= at_least or len(filled) == 1:
            break
        left = [left[i] for i in filled if i != emptiest]
    numbers = np.full(len(sizes), counts.argmax())
    numbers[known] = nearest
    return Buckets(
        sizes=tuple(left[i] for i in filled),
        rows=tuple(tuple(np.flatnonzero(numbers == i).tolist()) for i in filled),
    )


def _nearest(values: np.ndarray, sorted_centres: np.ndarray) -> np.ndarray:
    """For each value the index of the nearest centre."""
    borders = (sorted_centres[1:] + sorted_centres[:-1]) / 2
    return np.searchsorted(borders, values)


class BucketBatchSampler(Sampler[list[SampleIndex]]):
    """Endless batches over all processes, epoch after epoch, from the batch number `start` on.

    In an epoch the rows of each bucket come in an order of its own, cut into batches; the last one is filled up with
    rows from the start of that order. Then the batches of all buckets are shuffled. `bucket_rows` are the rows of each
    bucket; all rows in one are the plain shuffled order.
    """

    def __init__(self, bucket_rows: Sequence[Sequence[int]], global_batch: int, seed: int, start: int = 0) -> None:
        self.global_batch = global_batch
        self.start = start
        self._rows = [torch.tensor(rows) for rows in bucket_rows]
        self._seed = seed
        # Bucket and number within it of every batch of an epoch.
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
            orders = [self._order(len(rows), epoch, bucket) for bucket, rows in enumerate(self._rows)]
            for index in self._order(self.per_epoch, epoch, "batches")[skip:].tolist():
                bucket, number = self._batches[index]
                yield self._draws(epoch, self._rows[bucket], orders[bucket], number)
            epoch, skip = epoch + 1, 0

    def _draws(self, epoch: int, rows: Tensor, order: Tensor, number: int) -> list[SampleIndex]:
        places = range(number * self.global_batch, (number + 1) * self.global_batch)
        repeats, picked = zip(*(divmod(place, len(rows)) for place in places), strict=True)
        chosen = rows[order[list(picked)]].tolist()
        return [SampleIndex(epoch, row, repeat) for row, repeat in zip(chosen, repeats, strict=True)]

    def _order(self, length: int, epoch: int, what: int | str) -> Tensor:
        number = random.Random(f"{self._seed}/{epoch}/order/{what}").getrandbits(63)
        return torch.randperm(length, generator=torch.Generator().manual_seed(number))


class ProcessBatchSampler(Sampler[list[SampleIndex]]):
    """The part of each global batch that belongs to one process."""

    def __init__(self, batches: BucketBatchSampler, batch_size: int, process: int) -> None:
        self._batches = batches
        self._part = slice(process * batch_size, (process + 1) * batch_size)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        for draws in self._batches:
            yield draws[self._part]
