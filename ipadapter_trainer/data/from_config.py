"""The settings of a training as its parts understand them: which examples, how they are cut, which base model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..settings.config import TrainConfig
from .augmentation import Augmentation
from .buckets import Buckets, find_buckets
from .examples import Example, find_examples, fingerprint
from .face_embeds import with_faces
from .shard_files import expand_shards
from .shard_index import index_shards
from .sizes import sample_sizes, size_notes

log = logging.getLogger(__name__)


def examples_from_config(config: TrainConfig) -> list[Example]:
    """The examples of a folder, a list or local shards, with their face embeddings found where the kind takes them."""
    if config.from_shards:
        examples = index_shards(expand_shards(config.data))
    else:
        examples = find_examples(Path(config.data), config.data_root)
    return with_faces(examples, config.face_embeds, image_root(config)) if config.train_kind.takes_face else examples


def image_root(config: TrainConfig) -> Path:
    """The folder that file names are relative to."""
    data = Path(config.data)
    return config.data_root or (data if data.is_dir() else data.parent)


def data_fingerprint(config: TrainConfig, examples: Sequence[Example]) -> str:
    """What tells this data set from another one."""
    return fingerprint(examples, image_root(config))


def buckets_from_config(config: TrainConfig, examples: Sequence[Example]) -> Buckets:
    """The shapes that images are cut to; a bucket that cannot fill a batch is given up."""
    if not config.buckets:
        return Buckets.square(config.resolution, len(examples))
    return find_buckets(examples, config.resolution, config.bucket_step, at_least=config.batch_size)


def size_notes_from_config(config: TrainConfig, examples: Sequence[Example]) -> list[str]:
    """Sentences about images that are scaled up and buckets that hold too few, from the headers of a sample."""
    step = config.bucket_step if config.buckets else None
    return size_notes(sample_sizes(examples), len(examples), config.resolution, step, config.batch_size)


def warn_about_sizes(config: TrainConfig, examples: Sequence[Example]) -> None:
    """Log the sentences of `size_notes_from_config`."""
    for note in size_notes_from_config(config, examples):
        log.warning("%s", note)


def augmentation_from_config(config: TrainConfig) -> Augmentation:
    """How an example becomes an item."""
    return Augmentation(
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
