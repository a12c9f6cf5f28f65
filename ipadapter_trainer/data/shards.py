"""Batches from WebDataset shards: an endless stream, split over processes and workers, that resumes exactly.

The shards of an epoch, shuffled by (seed, epoch), are split over the processes and then over their workers, as
webdataset's split_by_node and split_by_worker do. Each worker makes whole batches of its shards, and the loader takes
them from the workers in turn: batch number n of a process comes from worker n % workers. So a position in the stream
is a number of batches, as long as the numbers of processes and workers stay the same.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .augmentation import Augmentation, RandomKey
from .dataset import Batch, collate, worker_options
from .images import why_unreadable
from .preprocess import Preprocessor, check_image_size, preprocess
from .shard_files import shard_name
from .tar_samples import TarSample, count_samples, stream_samples

_LOOK_AHEAD = 1000  # samples that are tried in place of a broken one


@dataclass(eq=False)
class ShardBatches(IterableDataset[Batch]):
    """The batches of one process; the arguments are those of `shard_loader`."""

    shards: Sequence[str]
    preprocessor: Preprocessor
    augmentation: Augmentation
    batch_size: int
    process: int
    processes: int
    start: int

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        number, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader asks worker 0 first, even if another worker would make this batch without the resume.
        worker = (self.start + number) % num_workers
        batches_before = len(range(worker, self.start, num_workers))
        part = slice(self.process + self.processes * worker, None, self.processes * num_workers)
        items = self._items(part, skip=batches_before * self.batch_size)
        while True:
            yield collate(list(islice(items, self.batch_size)))

    def _items(self, part: slice, skip: int) -> Iterator[dict[str, Any]]:
        """An item for each sample. A broken sample is replaced by the next good one, which still gets its own turn."""
        broken: list[str] = []
        stream = sample_stream(self.shards, part, self.augmentation.seed, broken, skip)
        ahead: deque[tuple[int, TarSample]] = deque()
        while True:
            epoch, sample = ahead.popleft() if ahead else next(stream)
            key = (self.augmentation.seed, epoch, sample.name)
            item = self._try(sample, key, broken)
            for i in range(_LOOK_AHEAD):
                if item is not None:
                    break
                if i == len(ahead):
                    ahead.append(next(stream))
                item = self._try(ahead[i][1], key, [])  # the error is reported when it is this sample's turn
            if item is None:
                raise DataError(f"None of {1 + _LOOK_AHEAD} samples in a row can be used. The first: {broken[0]}")
            yield {**item, "broken": [*broken]}
            broken.clear()

    def _try(self, sample: TarSample, key: RandomKey, broken: list[str]) -> dict[str, Any] | None:
        size = (self.augmentation.resolution, self.augmentation.resolution)
        try:
            return preprocess(self.preprocessor, self.augmentation, size, key, sample.example())
        except DataError as error:
            broken.append(str(error))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            broken.append(f"{sample.name}: {why_unreadable(error)}")
        return None


def sample_stream(
    shards: Sequence[str], part: slice, seed: int, broken: list[str], skip: int = 0
) -> Iterator[tuple[int, TarSample]]:
    """The epochs and samples of a `part` of the shuffled shards, endlessly, without the first `skip`. Problems of a
    shard are added to `broken`.

    Of local shards that are skipped whole only the headers are read; of other skipped samples nothing is decoded.

    Raises DataError when an epoch has no sample.
    """
    lengths: dict[str, int | None] = {}
    for epoch in count():
        order = random.Random(f"{seed}/{epoch}/shards").sample(shards, len(shards))
        found = 0
        for shard in order[part]:
            if skip and shard not in lengths:
                lengths[shard] = count_samples(shard)
            length = lengths.get(shard)
            if length is not None and length <= skip:
                skip -= length
                found += length
                continue
            number = 0
            for sample in stream_samples(shard, broken.append, f"{seed}/{epoch}/{shard_name(shard)}"):
                number += 1
                if skip:
                    skip -= 1
                else:
                    yield epoch, sample
            lengths[shard] = number
            found += number
        if not found:
            raise DataError(f"The shards hold no sample. {broken[0] if broken else f'The first is {shards[0]}.'}")


def shard_loader(
    shards: Sequence[str],
    preprocessor: Preprocessor,
    augmentation: Augmentation,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 4,
    start: int = 0,
    pin: bool = False,
) -> DataLoader[Batch]:
    """The endless batches of one process, from batch number `start` on: `batch_size` squares of the augmentation's
    resolution. `shards` come from `expand_shards`.

    A broken sample is replaced and named in the batch's `broken`. Raises DataError when there are fewer shards than
    workers in all processes and, from the iteration, when nothing can be read.
    """
    workers = max(num_workers, 1)
    if len(shards) < processes * workers:
        most = len(shards) // processes
        advice = f"Set num_workers={most}" if most else "Use fewer processes"
        raise DataError(
            f"{len(shards)} shards for {processes} processes with {workers} workers each: every worker needs at least "
            f"one shard. {advice}, or make more shards."
        )
    check_image_size((augmentation.resolution, augmentation.resolution), preprocessor)
    batches = ShardBatches(shards, preprocessor, augmentation, batch_size, process, processes, start)
    return DataLoader(batches, batch_size=None, **worker_options(num_workers, pin))
