"""Where a training's batches come from: images on disk, shards, or the cache; and the images held out of them."""

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
    """A data set, ready to draw from. `size` is None for a stream; `examples` are all of them, those of the validation
    included, and None for a stream; `held_out` are the readable examples of the validation; `sample` makes a batch of a
    few images in this process; `broken` collects what could not be read.
    """

    size: int | None
    data_hash: str
    open: Callable[[int], Iterator[Batch]]
    sample: Callable[[], Batch]
    examples: Sequence[Example] | None = None
    held_out: Sequence[Example] = ()
    broken: set[str] = field(default_factory=set[str])
    cached: bool = False

    @property
    def held_out_images(self) -> int:
        """How many examples the training does not see, those that cannot be read included."""
        return 0 if self.examples is None or self.size is None else len(self.examples) - self.size

    def try_images(self) -> tuple[int, list[str]]:
        """Make a few images ready as a training step would: how many were tried, those of the validation included, and
        a line for each that cannot be read.

        Raises DataError when not a single one can be read, CacheError when the cache cannot be.
        """
        with plain_errors():
            batch = self.sample()
        return len(batch["timesteps"]) + self.held_out_images, sorted({*batch["broken"], *self.broken})

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches of this process, from the number `start` on."""
        with plain_errors():
            for batch in self.open(start):
                self.broken.update(batch["broken"])
                yield batch


def open_training_data(config: TrainConfig, base_model: BaseModel, accelerator: Accelerator) -> TrainingData:
    """Find the data of a training; no image is decoded but the held-out ones.

    Raises DataError when there is nothing to train on, CacheError when the cache does not fit the settings.
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
    )


def known_examples(config: TrainConfig) -> list[Example] | None:
    """The examples of a training, the held-out ones included; None for a stream, whose shards must be there."""
    if config.streams:
        expand_shards(config.data)
        return None
    return examples_from_config(config)


def validation_batches(config: TrainConfig, base_model: BaseModel, held_out: Sequence[Example]) -> Iterator[Batch]:
    """The held-out examples as squares, without crops, flips and dropout, as many at once as in training."""
    dataset = ImageDataset(
        held_out, preprocessor_from_config(config, base_model), Augmentation(config.resolution, config.seed)
    )
    with plain_errors():
        for start in range(0, len(held_out), config.batch_size):
            rows = range(start, min(start + config.batch_size, len(held_out)))
            yield collate([dataset[row] for row in rows])


def held_out_rows(examples: Sequence[Example], wanted: int, root: Path | None = None) -> set[int]:
    """The rows that are kept from the training for the validation: at most a tenth, chosen by the hash of their
    names relative to `root`, so that they stay the same when images are added elsewhere.
    """

    def order(row: int) -> bytes:
        return hashlib.sha256(relative_name(examples[row].image, root).encode("utf-8", "surrogateescape")).digest()

    return set(sorted(range(len(examples)), key=order)[: min(wanted, len(examples) // 10)])


def readable(examples: Sequence[Example]) -> tuple[list[Example], set[str]]:
    """The examples whose images can be decoded, and a line for each that cannot."""
    fine, broken = [], set[str]()
    for example in examples:
        try:
            for image in (example.image, *example.references):
                open_rgb(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            broken.add(f"{example.name}: {why_unreadable(error)}")
        else:
            fine.append(example)
    return fine, broken


@contextmanager
def plain_errors() -> Iterator[None]:
    """A worker's error comes with its traceback in the text; the last line is the message."""
    try:
        yield
    except (CacheError, DataError) as error:
        kind = type(error)
        text = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        raise kind(text) from error
