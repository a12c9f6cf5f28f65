"""The data set of a training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..settings.config import TrainConfig
from .augmentation import Augmentation
from .buckets import Buckets, assign, make_buckets, read_sizes, sample_sizes, size_notes
from .examples import Example, find_examples, fingerprint
from .face_embeds import with_faces
from .shard_files import expand_shards
from .tar_samples import index_shards

log = logging.getLogger(__name__)


def examples_from_config(config: TrainConfig) -> list[Example]:
    """The examples of a folder, a list or local shards, with face embeddings if the kind takes them."""
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
    """`examples.fingerprint` of the data set."""
    return fingerprint(examples, image_root(config))


def buckets_from_config(config: TrainConfig, examples: Sequence[Example]) -> Buckets:
    """The buckets of the data set; each can fill a batch."""
    if not config.buckets:
        return Buckets.square(config.resolution, len(examples))
    return assign(read_sizes(examples), make_buckets(config.resolution, config.bucket_step), config.batch_size)


def warn_about_sizes(config: TrainConfig, examples: Sequence[Example]) -> None:
    """Log the `size_notes` of the data set, from the image sizes of a sample."""
    step = config.bucket_step if config.buckets else None
    for note in size_notes(sample_sizes(examples), len(examples), config.resolution, step, config.batch_size):
        log.warning("%s", note)


def augmentation_from_config(config: TrainConfig) -> Augmentation:
    """The augmentation, whose fields are fields of the config."""
    return Augmentation(**{field.name: getattr(config, field.name) for field in fields(Augmentation)})
