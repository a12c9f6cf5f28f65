"""The batches of a training, from image files, shards or the cache, and the images held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..cache.read import CachedDataset
from ..data.augmentation import Augmentation
from ..data.buckets import BucketBatchSampler
from ..data.dataset import Batch, ImageDataset, collate, loader
from ..data.examples import Example, relative_name
from ..data.from_config import (
    augmentation_from_config,
    buckets_from_config,
    data_fingerprint,
    examples_from_config,
    image_root,
    warn_about_sizes,
)
from ..data.images import open_rgb, why_unreadable
from ..data.shard_files import expand_shards, fingerprint_shards
from ..data.shards import shard_loader
from ..errors import CacheError, DataError
from ..models.base_model import BaseModel
from ..models.from_config import preprocessor_from_config
from ..settings.config import TrainConfig

_TRIED = 4  # images that are decoded before the first step


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A dataset. `size`: training images; `batches_per_epoch`: of all processes; `examples`: all examples, including
    held-out ones; all None for a stream.
    `held_out`: readable examples for validation. `open(n)`: batches of this process from number n on. `sample()`: a
    batch of a few images, loaded in this process. `broken`: a line for each image that could not be read.
    """

    size: int | None
    data_hash: str
    open: Callable[[int], Iterator[Batch]]
    sample: Callable[[], Batch]
    examples: Sequence[Example] | None = None
    held_out: Sequence[Example] = ()
    broken: set[str] = field(default_factory=set[str])
    cached: bool = False
    batches_per_epoch: int | None = None

    @property
    def held_out_images(self) -> int:
        """Number of held-out examples, including unreadable ones."""
        return 0 if self.examples is None or self.size is None else len(self.examples) - self.size

    def try_images(self) -> tuple[int, list[str]]:
        """Load a few images as a training step would. Returns how many were tried, including the held-out ones, and a
        line for each that cannot be read.

        Raises DataError if none can be read, CacheError if the cache cannot be read.
        """
        with plain_errors():
            batch = self.sample()
        return len(batch["timesteps"]) + self.held_out_images, sorted({*batch["broken"], *self.broken})

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches of this process, from number `start` on."""
        with plain_errors():
            for batch in self.open(start):
                self.broken.update(batch["broken"])
                yield batch


def open_training_data(config: TrainConfig, base_model: BaseModel, accelerator: Accelerator) -> TrainingData:
    """Open the data of a training. Only the held-out images are decoded.

    Raises DataError if there is nothing to train on, CacheError if the cache does not match the settings.
    """
    preprocessor, augmentation = preprocessor_from_config(config, base_model), augmentation_from_config(config)
    process, processes = accelerator.process_index, accelerator.num_processes
    pin = accelerator.device.type == "cuda"
    if config.streams:
        shards = expand_shards(config.data)

        def shards_from(start: int) -> DataLoader[Batch]:
            return shard_loader(
                shards,
                preprocessor,
                augmentation,
                batch_size=config.batch_size,
                process=process,
                processes=processes,
                num_workers=config.num_workers,
                start=start,
                pin=pin,
            )

        def sample_shards() -> Batch:
            shards_from(0)  # refuses too few shards
            return next(iter(shard_loader(shards, preprocessor, augmentation, batch_size=_TRIED, num_workers=0)))

        return TrainingData(None, fingerprint_shards(shards), lambda start: iter(shards_from(start)), sample_shards)

    examples = examples_from_config(config)
    if accelerator.is_main_process:
        warn_about_sizes(config, examples)
    held_out = held_out_rows(examples, config.validation_images, image_root(config))
    global_batch = config.batch_size * processes
    data_hash = data_fingerprint(config, examples)
    if config.cache is None:
        dataset = ImageDataset(examples, preprocessor, augmentation, buckets_from_config(config, examples))
    else:
        dataset = CachedDataset(config, base_model, examples)
    rows = [[row for row in bucket if row not in held_out] for bucket in dataset.buckets.rows]
    batches = BucketBatchSampler([bucket for bucket in rows if bucket], global_batch, config.seed)

    def open_images(start: int) -> Iterator[Batch]:
        return iter(
            loader(
                dataset,
                batches.starting_at(start),
                batch_size=config.batch_size,
                process=process,
                processes=processes,
                num_workers=config.num_workers,
                pin=pin,
            )
        )

    def sample_images() -> Batch:
        largest = max(rows, key=len)  # of one shape, so that they make a batch
        return collate([dataset[row] for row in largest[:: -(-len(largest) // _TRIED)]])

    shown, broken = readable([examples[row] for row in sorted(held_out)])
    return TrainingData(
        size=len(examples) - len(held_out),
        data_hash=data_hash,
        open=open_images,
        sample=sample_images,
        examples=examples,
        held_out=shown,
        broken=broken,
        cached=config.cache is not None,
        batches_per_epoch=batches.per_epoch,
    )


def validation_batches(config: TrainConfig, base_model: BaseModel, held_out: Sequence[Example]) -> Iterator[Batch]:
    """Batches of the held-out examples, center-cropped to squares, without flips and dropout."""
    dataset = ImageDataset(
        held_out, preprocessor_from_config(config, base_model), Augmentation(config.resolution, config.seed)
    )
    with plain_errors():
        for start in range(0, len(held_out), config.batch_size):
            rows = range(start, min(start + config.batch_size, len(held_out)))
            yield collate([dataset[row] for row in rows])


def held_out_rows(examples: Sequence[Example], wanted: int, root: Path | None = None) -> set[int]:
    """The rows held out for validation: at most a tenth, chosen by the hash of their file names relative to `root`, so
    that adding images hardly changes the choice.
    """

    def order(row: int) -> bytes:
        return hashlib.sha256(relative_name(examples[row].image, root).encode("utf-8", "surrogateescape")).digest()

    return set(sorted(range(len(examples)), key=order)[: min(wanted, len(examples) // 10)])


def readable(examples: Sequence[Example]) -> tuple[list[Example], set[str]]:
    """The examples whose images can be decoded, and a line for each of the others."""
    fine, broken = [], set[str]()
    for example in examples:
        try:
            for image in (example.image, *example.references):
                open_rgb(image)
        except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
            broken.add(f"{example.name}: {why_unreadable(error)}")
        else:
            fine.append(example)
    return fine, broken


@contextmanager
def plain_errors() -> Iterator[None]:
    """Remove the worker's traceback from the message of an error: the message is its last line."""
    try:
        yield
    except (CacheError, DataError) as error:
        kind = type(error)
        text = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        raise kind(text) from error
