"""What a feature cache holds: its settings, and the shards of its three tables. All follow from the config, the data
and the models' configs, so every process and every resume finds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.buckets import Buckets
from ..data.examples import Example
from ..data.from_config import data_fingerprint
from ..data.images import Size, StoredImage
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .quantise import pack_features

TABLES = ("captions", "references", "images")
SIZES = ("original_size", "crop_coords_top_left", "target_size")
SHARD_BYTES = 128 * 10**6  # what an interruption loses at most, in each process


@dataclass(frozen=True)
class CacheSettings:
    """What a cache and a training that reads it must have in common."""

    image_feature: Literal["image_embeds", "penultimate_hidden_states"] | None  # None: no image features are stored
    cache_image_features: Literal["float16", "int8", "none"]
    own_references: bool  # images with other references have the features of themselves, too
    resolution: int
    buckets: bool
    bucket_step: int | None
    crop: str
    flip: bool
    reference_crop: float
    seed: int | None  # of the random crops; None without
    cache_variants: int  # random crops of an image
    # Fingerprints; "" in a forecast.
    data: str
    vae: str
    text_encoders: str
    image_encoder: str | None

    @classmethod
    def of(cls, config: TrainConfig, examples: Sequence[Example], base_model: BaseModel | None = None) -> CacheSettings:
        """Of a training's cache. Without `base_model` there are no fingerprints, and no weights are read."""
        kind = config.train_kind
        # An embedding is small: `cache_image_features` is about hidden states only.
        stored = config.cache_image_features if kind.takes_hidden_states else "float16"
        encoded = kind.takes_image and stored != "none"
        feature = "penultimate_hidden_states" if kind.takes_hidden_states else "image_embeds"
        random = config.crop == "random" or (encoded and config.reference_crop < 1)
        return cls(
            image_feature=feature if encoded else None,
            cache_image_features=stored if encoded else "none",
            own_references=encoded and config.self_reference > 0 and any(e.references for e in examples),
            resolution=config.resolution,
            buckets=config.buckets,
            bucket_step=config.bucket_step if config.buckets else None,
            crop=config.crop,
            flip=config.flip,
            reference_crop=config.reference_crop if encoded else 1.0,
            seed=config.seed if random else None,
            cache_variants=config.cache_variants if random else 1,
            data=data_fingerprint(config, examples) if base_model else "",
            vae=base_model.vae_fingerprint() if base_model else "",
            text_encoders=base_model.text_fingerprint() if base_model else "",
            image_encoder=base_model.encoder_fingerprint() if base_model and encoded else None,
        )

    def variants(self, random: bool = True) -> int:
        """Stored variants of what is cropped at random, or not; with `flip`, each crop is followed by its mirror
        image.
        """
        return (self.cache_variants if random else 1) * (2 if self.flip else 1)

    @property
    def digest(self) -> str:
        """32 hex digits that mark the shards of one cache."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]

    def differences(self, found: CacheSettings) -> str:
        """A clause for each of the `found` settings that differs from these."""
        before, now = asdict(found), asdict(self)
        return "; ".join(f"{k} was {before[k]!r} and is now {now[k]!r}" for k in now if now[k] != before[k])


def distinct_captions(examples: Sequence[Example]) -> list[str]:
    """The rows of the table of captions; the empty one, for dropped texts, is the first."""
    return list(dict.fromkeys(["", *(example.text for example in examples)]))


def distinct_references(examples: Sequence[Example]) -> list[StoredImage]:
    """The rows of the table of references."""
    return list(dict.fromkeys(reference for example in examples for reference in example.references))


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of a table. The images of a shard belong to one bucket."""

    table: str
    file: str  # relative to the cache's folder
    rows: np.ndarray  # int32, numbers of captions, of references or of examples
    tensors: Mapping[str, Tensor]  # of one row, on the meta device
    size: Size | None  # the bucket

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of all rows."""
        return len(self.rows) * _row_bytes(self.tensors)


def plan_shards(
    settings: CacheSettings,
    base_model: BaseModel,
    examples: Sequence[Example],
    buckets: Buckets,
    dtype: torch.dtype = torch.float16,
) -> list[Shard]:
    """All shards of a cache, table by table. No weights are read; the sum of `bytes` is the size of the cache."""
    shards: list[Shard] = []
    numbers = {table: count() for table in TABLES}
    for table, rows, size, tensors in _row_groups(settings, base_model, examples, buckets, dtype):
        each = max(1, SHARD_BYTES // _row_bytes(tensors))
        for start in range(0, len(rows), each):
            file = f"{table}/shard-{next(numbers[table]):05d}.safetensors"
            shards.append(Shard(table, file, rows[start : start + each].astype(np.int32), tensors, size))
    return shards


def _row_groups(
    settings: CacheSettings, base_model: BaseModel, examples: Sequence[Example], buckets: Buckets, dtype: torch.dtype
) -> Iterator[tuple[str, np.ndarray, Size | None, dict[str, Tensor]]]:
    """Rows whose tensors have the same shapes: table, rows, bucket, tensors of one row."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def image_features(random: bool) -> dict[str, Tensor]:
        hidden = settings.image_feature == "penultimate_hidden_states"
        shape = (base_model.image_tokens, base_model.hidden_dim) if hidden else (base_model.image_dim,)
        return pack_features(empty(settings.variants(random), *shape), settings.cache_image_features == "int8")

    text = {"text_states": empty(base_model.text_length, base_model.sites[0].cross_attention_dim)}
    conditions = base_model.meta_conditions(1)
    if conditions is not None:
        text["text_embeds"] = empty(conditions["text_embeds"].shape[-1])
    yield "captions", np.arange(len(distinct_captions(examples))), None, text
    encoded = np.zeros(len(examples), dtype=bool)  # images that are their own references
    if settings.image_feature is not None:
        rows = np.arange(len(distinct_references(examples)))
        yield "references", rows, None, image_features(random=settings.reference_crop < 1)
        encoded |= np.array([settings.own_references or not example.references for example in examples])
    for size, bucket in zip(buckets.sizes, buckets.rows, strict=True):
        variants, rows = settings.variants(settings.crop == "random"), np.array(bucket)
        shape = (base_model.latent_channels, size[1] // base_model.latent_scale, size[0] // base_model.latent_scale)
        tensors = {key: empty(variants, *shape) for key in ("latents_mean", "latents_std")}
        tensors |= {key: empty(variants, 2, dtype=torch.float32) for key in SIZES}  # exact above 2048
        if encoded.any():
            yield "images", rows[encoded[rows]], size, tensors | image_features(random=True)
        yield "images", rows[~encoded[rows]], size, tensors


def _row_bytes(tensors: Mapping[str, Tensor]) -> int:
    return 4 + sum(tensor.nbytes for tensor in tensors.values())  # 4 for the number of the row
