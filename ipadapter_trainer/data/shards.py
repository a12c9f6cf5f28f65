"""Batches from WebDataset shards: endless, split over processes and workers, resumed exactly.

The shards of an epoch, shuffled by (seed, epoch), are dealt to the processes and then to their workers, as webdataset's
split_by_node and split_by_worker do; each worker makes whole batches of its own shards, and the batches come from the
workers in turn. So batch number n of a process comes from its worker n % workers, and a position in the stream is a
number of batches. Another number of processes or workers deals otherwise, which a resume must not do.
"""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .augmentation import Augmentation, RandomKey
from .dataset import Batch, collate, worker_options
from .face_embeds import check_face_embed
from .images import Size, why_unreadable
from .preprocess import Preprocessor, check_image_size, preprocess
from .shard_files import RawSample, Sample, count_samples, parse_sample, raw_samples, shard_name

_LOOK_AHEAD = 1000  # samples that are tried where a whole batch is broken


class ShardWorker(NamedTuple):
    """Which part of the stream a worker makes."""

    process: int
    processes: int
    worker: int
    num_workers: int


class ShardBatches(IterableDataset[Batch]):
    """The batches of one process; `shard_loader` says what the arguments are."""

    def __init__(
        self,
        shards: Sequence[str],
        preprocessor: Preprocessor,
        augmentation: Augmentation,
        *,
        batch_size: int,
        process: int,
        processes: int,
        seed: int,
        start: int,
    ) -> None:
        self.shards = tuple(shards)
        self.preprocessor = preprocessor
        self.augmentation = augmentation
        self.size: Size = (augmentation.resolution, augmentation.resolution)
        self.batch_size = batch_size
        self._process, self._processes = process, processes
        self._seed, self._start = seed, start
        check_image_size(self.size, preprocessor)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        number, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader asks worker 0 first, also for a batch that another worker would have made without the resume.
        worker = (self._start + number) % num_workers
        made = len(range(worker, self._start, num_workers))
        place = ShardWorker(self._process, self._processes, worker, num_workers)
        broken: list[str] = []
        stream = sample_stream(self.shards, place, self._seed, broken, skip=made * self.batch_size)
        ahead: deque[tuple[int, RawSample]] = deque()
        while True:
            while len(ahead) < self.batch_size:
                ahead.append(next(stream))
            batch = self._batch([ahead.popleft() for _ in range(self.batch_size)], stream, ahead, broken)
            broken.clear()
            yield batch

    def _batch(
        self,
        samples: list[tuple[int, RawSample]],
        stream: Iterator[tuple[int, RawSample]],
        ahead: deque[tuple[int, RawSample]],
        broken: list[str],
    ) -> Batch:
        """Every broken sample is replaced by the next good one of the batch, or else of the stream, which still gets
        its own turn.
        """
        addresses = [_address(self._seed, epoch, raw) for epoch, raw in samples]
        items = [self._try(raw, address, broken) for (_, raw), address in zip(samples, addresses, strict=True)]
        good = [i for i, item in enumerate(items) if item is not None]
        spare = None if good else self._next_good(stream, ahead, broken)
        complete: list[dict[str, Any]] = []
        for i, item in enumerate(items):
            j = next((j for j in good if j >= i), good[0]) if good else -1
            raw, whole = (samples[j][1], items[j]) if spare is None else spare
            if item is None:
                # With the randomness of the one it stands for, so that it is not the same row twice.
                whole = self._try(raw, addresses[i], []) or whole
            assert whole is not None
            complete.append({**whole, "broken": broken if i == 0 else []})
        return collate(complete)

    def _next_good(
        self,
        stream: Iterator[tuple[int, RawSample]],
        ahead: deque[tuple[int, RawSample]],
        broken: list[str],
    ) -> tuple[RawSample, dict[str, Any]]:
        for i in range(_LOOK_AHEAD):
            if i == len(ahead):
                ahead.append(next(stream))
            epoch, raw = ahead[i]
            # Not reported here: it will be when it is its turn.
            item = self._try(raw, _address(self._seed, epoch, raw), [])
            if item is not None:
                return raw, item
        raise DataError(f"None of {self.batch_size + _LOOK_AHEAD} samples in a row can be used. The first: {broken[0]}")

    def _try(self, raw: RawSample, address: RandomKey, broken: list[str]) -> dict[str, Any] | None:
        try:
            return self._item(parse_sample(raw), address)
        except DataError as error:
            broken.append(str(error))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            broken.append(f"{address[2]}: {why_unreadable(error)}")
        return None

    def _item(self, sample: Sample, address: RandomKey) -> dict[str, Any]:
        face = None
        if self.preprocessor.takes_face:
            if sample.face_id_embed is None:
                raise DataError(f"{sample.name}: no face embedding (.face.npy).")
            face = check_face_embed(sample.face_id_embed, self.preprocessor.face_dim, sample.name)
        references = [io.BytesIO(reference) for reference in sample.references]
        return preprocess(
            self.preprocessor,
            self.augmentation,
            self.size,
            address,
            io.BytesIO(sample.image),
            sample.text,
            references,
            face,
        )


def sample_stream(
    shards: Sequence[str], place: ShardWorker, seed: int, broken: list[str], skip: int = 0
) -> Iterator[tuple[int, RawSample]]:
    """The epochs and undecoded samples of a place, endlessly, without the first `skip`. What is wrong with a shard is
    added to `broken`.

    Local shards that are skipped whole are not read, but for their headers; of others nothing is decoded.

    Raises DataError when an epoch has no sample.
    """
    lengths: dict[str, int | None] = {}
    for epoch in count():
        order = random.Random(f"{seed}/{epoch}/shards").sample(shards, len(shards))
        mine = islice(islice(order, place.process, None, place.processes), place.worker, None, place.num_workers)
        found = 0
        for shard in mine:
            if skip and shard not in lengths:
                lengths[shard] = count_samples(shard)
            length = lengths.get(shard)
            if length is not None and length <= skip:
                skip -= length
                found += length
                continue
            number = 0
            for raw in raw_samples(shard, broken.append, f"{seed}/{epoch}/{shard_name(shard)}"):
                number += 1
                if skip:
                    skip -= 1
                else:
                    yield epoch, raw
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
    seed: int = 0,
    start: int = 0,
    pin: bool = False,
) -> DataLoader[Batch]:
    """The endless batches of one process, `batch_size` samples each, from the batch number `start` on: squares of the
    recipe's resolution. `shards` are those of `expand_shards`.

    A broken sample is replaced and named in the batch's `broken`. Raises DataError when there are fewer shards than
    processes times workers and, from the iteration, when nothing can be read.
    """
    workers_each = max(num_workers, 1)
    if len(shards) < processes * workers_each:
        most = len(shards) // processes
        advice = (
            f"Set num_workers={most}, or make more shards." if most else "Make more shards, or use fewer processes."
        )
        raise DataError(
            f"{len(shards)} shards for {processes} processes with {workers_each} workers each: every worker needs a "
            f"shard of its own. {advice}"
        )
    batches = ShardBatches(
        shards,
        preprocessor,
        augmentation,
        batch_size=batch_size,
        process=process,
        processes=processes,
        seed=seed,
        start=start,
    )
    return DataLoader(batches, batch_size=None, **worker_options(num_workers, pin))


def _address(seed: int, epoch: int, raw: RawSample) -> RandomKey:
    return seed, epoch, f"{shard_name(raw['__url__'])}/{raw['__key__']}"
