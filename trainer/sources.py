"""Where a training's batches come from: pictures on disk, shards, or the cache; and the pictures held out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from .base_model import BaseModel
from .buckets import Buckets, find_buckets
from .config import TrainConfig
from .data import Batch, Encoding, GlobalBatches, PictureDataset, Recipe, collate, loader
from .errors import CacheError, DataError
from .examples import Example, find_examples, fingerprint
from .face_embeds import with_faces
from .kinds import FACE_WIDTH
from .pixels import open_rgb
from .shard_files import expand_shards, fingerprint_shards
from .shards import shard_loader


@dataclass(frozen=True, eq=False)
class Source:
    """A data set, ready to draw from. `size` is None for a stream; `held_out` are examples of the validation;
    `broken` collects what could not be read.
    """

    size: int | None
    data_hash: str
    open: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Example] = ()
    broken: set[str] = field(default_factory=set[str])
    cached: bool = False

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches of this process, from the number `start` on."""
        with plain_errors():
            for batch in self.open(start):
                self.broken.update(batch["broken"])
                yield batch


def open_source(config: TrainConfig, base_model: BaseModel, accelerator: Accelerator) -> Source:
    """Find the data of a training; no picture is decoded.

    Raises DataError when there is nothing to train on, CacheError when the cache does not fit the settings.
    """
    encoding, recipe = encoding_of(config, base_model), recipe_of(config)
    process, processes = accelerator.process_index, accelerator.num_processes
    pin = accelerator.device.type == "cuda"
    if config.from_shards:
        shards = expand_shards(config.data)

        def open_shards(start: int) -> Iterator[Batch]:
            return iter(
                shard_loader(
                    shards,
                    encoding,
                    recipe,
                    batch_size=config.batch_size,
                    process=process,
                    processes=processes,
                    workers=config.workers,
                    seed=config.seed,
                    start=start,
                    pin=pin,
                )
            )

        return Source(None, fingerprint_shards(shards), open_shards)

    examples = examples_of(config)
    held_out = held_out_rows(examples, config.validation_pictures)
    global_batch = config.batch_size * processes
    data_hash = hash_of(config, examples)
    if config.cache is None:
        dataset = PictureDataset(examples, encoding, recipe, buckets_of(config, examples))
    else:
        from .cached_data import CachedDataset, open_cache

        cache = open_cache(config.cache, config, base_model, examples, data_hash)
        dataset = CachedDataset(examples, encoding, recipe, cache)
    rows = [[row for row in bucket if row not in held_out] for bucket in dataset.buckets.rows]
    batches = GlobalBatches([bucket for bucket in rows if bucket], global_batch, config.seed)

    def open_pictures(start: int) -> Iterator[Batch]:
        return iter(
            loader(
                dataset,
                batches.starting_at(start),
                batch_size=config.batch_size,
                process=process,
                processes=processes,
                workers=config.workers,
                pin=pin,
            )
        )

    return Source(
        size=len(examples) - len(held_out),
        data_hash=data_hash,
        open=open_pictures,
        held_out=[examples[row] for row in sorted(held_out)],
        cached=config.cache is not None,
    )


def count_examples(config: TrainConfig) -> int | None:
    """How many examples a training draws from; None for shards."""
    if config.from_shards:
        expand_shards(config.data)
        return None
    examples = examples_of(config)
    return len(examples) - len(held_out_rows(examples, config.validation_pictures))


def validation_batch(config: TrainConfig, base_model: BaseModel, held_out: Sequence[Example]) -> Batch:
    """The held-out examples as squares, without crops, flips and dropout."""
    dataset = PictureDataset(held_out, encoding_of(config, base_model), Recipe(config.resolution, config.seed))
    with plain_errors():
        return collate([dataset[row] for row in range(len(held_out))])


def prompt_picture(example: Example) -> Image.Image:
    """The picture that is an example's image prompt. Raises what Pillow raises for one that cannot be read."""
    return open_rgb(example.references[0] if example.references else example.image)[0]


def examples_of(config: TrainConfig) -> list[Example]:
    """The examples of a folder or list, with their face embeddings found where the kind takes them."""
    examples = find_examples(Path(config.data), config.data_root)
    return with_faces(examples, config.face_embeds, root_of(config)) if config.train_kind.takes_face else examples


def root_of(config: TrainConfig) -> Path:
    """The folder that file names are relative to."""
    data = Path(config.data)
    return config.data_root or (data if data.is_dir() else data.parent)


def hash_of(config: TrainConfig, examples: Sequence[Example]) -> str:
    """What tells this data set from another one."""
    return fingerprint(examples, root_of(config))


def buckets_of(config: TrainConfig, examples: Sequence[Example]) -> Buckets:
    """The shapes that pictures are cut to; a bucket that cannot fill a batch is given up."""
    if not config.buckets:
        return Buckets.square(config.resolution, len(examples))
    return find_buckets(examples, config.resolution, config.bucket_step, at_least=config.batch_size)


def encoding_of(config: TrainConfig, base_model: BaseModel) -> Encoding:
    """What the workers need of the base model."""
    kind = config.train_kind
    return Encoding(
        tokenizers=base_model.tokenizers,
        text_length=base_model.text_length,
        image_processor=base_model.image_processor if kind.takes_image else None,
        latent_scale=base_model.latent_scale,
        latent_channels=base_model.latent_channels,
        num_train_timesteps=base_model.num_train_timesteps,
        takes_face=kind.takes_face,
        face_width=FACE_WIDTH,
    )


def recipe_of(config: TrainConfig) -> Recipe:
    """How an example becomes an item."""
    return Recipe(
        resolution=config.resolution,
        seed=config.seed,
        flip=config.flip,
        crop=config.crop,
        image_dropout=config.image_dropout,
        text_dropout=config.text_dropout,
        both_dropout=config.both_dropout,
        noise_offset=config.noise_offset,
        reference_crop=config.reference_crop,
        self_reference=config.self_reference,
    )


def held_out_rows(examples: Sequence[Example], wanted: int) -> set[int]:
    """The rows that are kept from the training for the validation: at most a tenth, chosen by the hash of their
    names, so that they stay the same when pictures are added elsewhere.
    """

    def order(row: int) -> bytes:
        return hashlib.sha256(Path(examples[row].name).name.encode("utf-8", "surrogateescape")).digest()

    return set(sorted(range(len(examples)), key=order)[: min(wanted, len(examples) // 10)])


@contextmanager
def plain_errors() -> Iterator[None]:
    """A worker's error comes with its traceback in the text; the last line is the message."""
    try:
        yield
    except (CacheError, DataError) as error:
        kind = type(error)
        text = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        raise kind(text) from error
