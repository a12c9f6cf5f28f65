"""What a feature cache holds: its settings, tables, rows and shards. All follow from the config, the data and the
models' configs, so every process and every resume finds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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

    @property
    def variants(self) -> int:
        """Stored image features per image that is its own reference: crops and, with `flip`, mirror images."""
        return self.cache_variants * (2 if self.flip else 1)

    @property
    def latent_variants(self) -> int:
        """Stored latents per image."""
        return self.variants if self.crop == "random" else self.variants // self.cache_variants

    @property
    def reference_variants(self) -> int:
        """Stored image features per other reference."""
        return self.variants if self.reference_crop < 1 else self.variants // self.cache_variants

    @property
    def digest(self) -> str:
        """32 hex digits that mark the shards of one cache."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """One clause for each of the `found` settings that differs from these."""
        return [
            f"{key} was {found.get(key)!r} and is now {value!r}"
            for key, value in asdict(self).items()
            if found.get(key) != value
        ]


def distinct_captions(examples: Sequence[Example]) -> list[str]:
    """The rows of the table of captions; the empty one, for dropped texts, is the first."""
    return list(dict.fromkeys(["", *(example.text for example in examples)]))


def distinct_references(examples: Sequence[Example]) -> dict[str, StoredImage]:
    """The rows of the table of references, by their names."""
    return {str(reference): reference for example in examples for reference in example.references}


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of a table. The images of a shard belong to one bucket."""

    table: str
    number: int
    rows: np.ndarray  # int32, numbers of captions, of references or of examples
    tensors: dict[str, Tensor]  # of one row, on the meta device
    size: Size | None  # the bucket

    @property
    def file(self) -> str:
        """The path in the cache's folder."""
        return f"{self.table}/shard-{self.number:05d}.safetensors"

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
    # Rows with equal tensors: table, rows, bucket, whether image features are stored.
    groups: list[tuple[str, np.ndarray, Size | None, bool]]
    groups = [("captions", np.arange(len(distinct_captions(examples))), None, False)]
    own = np.zeros(len(examples), dtype=bool)
    if settings.image_feature is not None:
        groups.append(("references", np.arange(len(distinct_references(examples))), None, True))
        own |= np.array([settings.own_references or not example.references for example in examples])
    for size, rows in zip(buckets.sizes, map(np.array, buckets.rows), strict=True):
        groups += [("images", rows[own[rows] == encoded], size, encoded) for encoded in (True, False)]
    shards: list[Shard] = []
    count = Counter[str]()
    for table, rows, size, encoded in groups:
        tensors = _row_tensors(settings, base_model, dtype, table, size, encoded)
        each = max(1, SHARD_BYTES // _row_bytes(tensors))
        for start in range(0, len(rows), each):
            shards.append(Shard(table, count[table], rows[start : start + each].astype(np.int32), tensors, size))
            count[table] += 1
    return shards


def _row_tensors(
    settings: CacheSettings, base_model: BaseModel, dtype: torch.dtype, table: str, size: Size | None, encoded: bool
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    if table == "captions":
        shapes["text_states"] = (base_model.text_length, base_model.sites[0].cross_attention_dim)
        conditions = base_model.meta_conditions(1)
        if conditions is not None:
            shapes["text_embeds"] = (conditions["text_embeds"].shape[-1],)
    if size is not None:
        sides = (size[1] // base_model.latent_scale, size[0] // base_model.latent_scale)
        shapes["latents_mean"] = shapes["latents_std"] = (settings.latent_variants, base_model.latent_channels, *sides)
    tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
    tensors["row"] = torch.empty((), dtype=torch.int32, device="meta")
    if size is not None:  # float16 has no whole numbers above 2048
        tensors |= {key: torch.empty(settings.latent_variants, 2, device="meta") for key in SIZES}
    if encoded:
        variants = settings.reference_variants if size is None else settings.variants
        shape = (variants, base_model.image_dim)
        if settings.image_feature == "penultimate_hidden_states":
            shape = (variants, base_model.image_tokens, base_model.hidden_dim)
        features = torch.empty(shape, dtype=dtype, device="meta")
        tensors |= pack_features(features, settings.cache_image_features == "int8")
    return tensors


def _row_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
