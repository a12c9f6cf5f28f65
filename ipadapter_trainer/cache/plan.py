"""What a feature cache holds: its settings, rows and shards. All follow from the config, the data and the models'
configs, so every process and every resume finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.buckets import Buckets
from ..data.examples import Example
from ..data.from_config import data_fingerprint
from ..data.images import Size
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .files import SIZES
from .quantise import pack_features

TABLES = {"captions": "distinct captions", "references": "other references", "images": "images"}  # with their rows
SHARD_BYTES = 128 * 10**6  # what an interruption loses at most, in each process


def cache_settings(
    config: TrainConfig, examples: Sequence[Example], base_model: BaseModel | None = None
) -> dict[str, Any]:
    """What a cache and a training that reads it must have in common. Settings that do not matter have a fixed value.

    Without `base_model` there are no fingerprints, and no weights are read.
    """
    kind = config.train_kind
    # An embedding is small: `cache_image_features` is about hidden states only.
    stored = config.cache_image_features if kind.takes_hidden_states else "float16"
    encoded = kind.takes_image and stored != "none"
    feature = "penultimate_hidden_states" if kind.takes_hidden_states else "image_embeds"
    random = config.crop == "random" or (encoded and config.reference_crop < 1)
    settings: dict[str, Any] = {
        "image_feature": feature if encoded else None,
        "cache_image_features": stored if encoded else "none",
        # Whether images with other references have the features of themselves, too.
        "own_references": encoded and config.self_reference > 0 and any(e.references for e in examples),
        "resolution": config.resolution,
        "bucket_step": config.bucket_step if config.buckets else None,
        "crop": config.crop,
        "flip": config.flip,
        "reference_crop": config.reference_crop if encoded else 1.0,
        "seed": config.seed if random else None,
        "cache_variants": config.cache_variants if random else 1,
    }
    if base_model is not None:
        settings["images"] = len(examples)
        settings["data"] = data_fingerprint(config, examples)
        settings["vae"] = base_model.vae_fingerprint()
        settings["text_encoders"] = base_model.text_fingerprint()
        settings["image_encoder"] = base_model.encoder_fingerprint() if encoded else None
        settings["image_encoder_config"] = base_model.encoder_values() if encoded else None
    return settings


def variants(settings: Mapping[str, Any], random: bool = True) -> int:
    """Variants of a row: `cache_variants` of what is cropped at random, else 1; with `flip` twice as many."""
    return (settings["cache_variants"] if random else 1) * (2 if settings["flip"] else 1)


def cache_rows(settings: Mapping[str, Any], examples: Sequence[Example]) -> list[Any]:
    """What the rows of a cache are made of: the images, the distinct captions as str, of which the first is the empty
    one, for dropped texts, and the distinct references.
    """
    captions = dict.fromkeys(["", *(example.text for example in examples)])
    references = dict.fromkeys(reference for example in examples for reference in example.references)
    return [*(e.image for e in examples), *captions, *(references if settings["image_feature"] is not None else ())]


@dataclass(frozen=True, eq=False)
class Shard:
    """A file with rows of one kind, whose tensors have the same shapes."""

    table: str  # a key of TABLES
    file: str  # relative to the cache's folder
    rows: np.ndarray  # int32, of `cache_rows`
    tensors: Mapping[str, Tensor]  # of one row, on the meta device
    size: Size  # of the images: their bucket

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of all rows."""
        return len(self.rows) * _row_bytes(self.tensors)


def plan_shards(
    settings: Mapping[str, Any],
    base_model: BaseModel,
    examples: Sequence[Example],
    buckets: Buckets,
    dtype: torch.dtype = torch.float16,
) -> list[Shard]:
    """All shards of a cache, table by table. No weights are read; the sum of `bytes` is the size of the cache."""
    shards: dict[str, list[Shard]] = {table: [] for table in TABLES}

    def add(table: str, rows: np.ndarray, tensors: Mapping[str, Tensor], size: Size) -> None:
        each = max(1, SHARD_BYTES // _row_bytes(tensors))
        for start in range(0, len(rows), each):
            file = f"{table}/shard-{len(shards[table]):05d}.safetensors"
            shards[table].append(Shard(table, file, rows[start : start + each].astype(np.int32), tensors, size))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def image_features(random: bool) -> dict[str, Tensor]:
        hidden = settings["image_feature"] == "penultimate_hidden_states"
        shape = (base_model.image_tokens, base_model.hidden_dim) if hidden else (base_model.image_dim,)
        return pack_features(empty(variants(settings, random), *shape), settings["cache_image_features"] == "int8")

    rows = cache_rows(settings, examples)
    captions = np.flatnonzero([isinstance(row, str) for row in rows])
    square = (settings["resolution"], settings["resolution"])
    text = {"text_states": empty(1, base_model.text_length, base_model.sites[0].cross_attention_dim)}
    if (conditions := base_model.meta_conditions(1)) is not None:
        text["text_embeds"] = empty(1, conditions["text_embeds"].shape[-1])
    add("captions", captions, text, square)
    file_size = {"file_size": empty(dtype=torch.int64)}
    encoded = np.zeros(len(examples), dtype=bool)  # images that are their own references
    if settings["image_feature"] is not None:
        references = np.arange(captions[-1] + 1, len(rows))
        add("references", references, image_features(settings["reference_crop"] < 1) | file_size, square)
        encoded |= [settings["own_references"] or not example.references for example in examples]
    for size, bucket in zip(buckets.sizes, map(np.array, buckets.rows), strict=True):
        count = variants(settings, settings["crop"] == "random")
        shape = (base_model.latent_channels, size[1] // base_model.latent_scale, size[0] // base_model.latent_scale)
        tensors = {key: empty(count, *shape) for key in ("latents_mean", "latents_std")}
        tensors |= {key: empty(count, 2, dtype=torch.float32) for key in SIZES} | file_size  # exact above 2048
        if encoded.any():
            add("images", bucket[encoded[bucket]], tensors | image_features(random=True), size)
        add("images", bucket[~encoded[bucket]], tensors, size)
    return [shard for table in shards.values() for shard in table]


def _row_bytes(tensors: Mapping[str, Tensor]) -> int:
    return 4 + sum(tensor.nbytes for tensor in tensors.values())  # 4 for the number of the row
