"""The frozen models at work for a feature cache: rows of a table -> shards on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.augmentation import Augmentation
from ..data.buckets import Buckets
from ..data.dataset import worker_options
from ..data.examples import Example
from ..data.preprocess import Preprocessor, tokenize
from ..errors import CacheError
from ..models.base_model import BaseModel
from ..models.conditioning import encode_tokens
from ..models.features import encode_moments
from ..models.image_features import encode_clip_images
from ..settings.config import TrainConfig
from .files import SCALES, ShardHeader, quantise, write_shard
from .plan import Plan, Rows, Shard
from .settings import Settings
from .views import ImageViews, ReferenceViews, stack

Encoded = tuple[Shard, dict[str, Tensor], list[str]]  # a shard, some of its rows, and why a row could not be read


@dataclass(frozen=True, eq=False)
class Caching:
    """Everything that writing a cache touches."""

    config: TrainConfig
    folder: Path
    base_model: BaseModel
    preprocessor: Preprocessor
    augmentation: Augmentation
    examples: Sequence[Example]
    rows: Rows
    buckets: Buckets
    settings: Settings
    plan: Plan
    dtype: torch.dtype

    def loader(self, shards: Sequence[Shard]) -> Iterator[dict[str, Tensor | list[str]]]:
        """Batches of the rows of some shards of one table, in order; none crosses a shard."""
        settings, variants = self.settings, self.settings.reference_variants
        dataset: ImageViews | ReferenceViews = ReferenceViews(
            self.rows.references, self.preprocessor, self.augmentation, variants
        )
        if shards[0].table == "images":
            variants = max(settings.latent_variants, settings.own_variants)
            dataset = ImageViews(
                self.examples, self.preprocessor, self.augmentation, settings.latent_variants, settings.own_variants
            )
        each = max(1, self.config.batch_size // variants)
        batches = [
            [(int(item), shard.size, shard.own) for item in shard.items[first : first + each]]
            for shard in shards
            for first in range(0, len(shard.items), each)
        ]
        on_gpu = self.base_model.device.type == "cuda"
        options = worker_options(self.config.num_workers, on_gpu)
        return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=stack, **options))


def write_table(caching: Caching, shards: Sequence[Shard], progress_bar: bool) -> None:
    """Write some shards of one table. Raises DiskError, and CacheError for values that do not fit."""
    table = shards[0].table
    rows = sum(len(shard.items) for shard in shards)
    unit = "caption" if table == "texts" else "img"
    encoded = _encoded_texts(caching, shards) if table == "texts" else _encoded_images(caching, shards)
    with tqdm(total=rows, desc=table, unit=unit, dynamic_ncols=True, disable=not progress_bar) as bar:
        for number, batches in groupby(encoded, key=lambda batch: batch[0].number):
            shard = next(shard for shard in shards if shard.number == number)
            tensors: dict[str, Tensor] = {}
            broken: dict[str, str] = {}
            done = 0
            for _, values, reasons in batches:
                count = len(reasons)
                for key, value in values.items():
                    kept = _kept(value, caching.dtype, shard, key)
                    whole = tensors.setdefault(key, kept.new_zeros(len(shard.items), *kept.shape[1:]))
                    whole[done : done + count] = kept
                items = shard.items[done : done + count]
                broken |= {str(item): reason for item, reason in zip(items, reasons, strict=True) if reason}
                done += count
                bar.update(count)
            if table == "images":
                tensors["row"] = torch.from_numpy(shard.items.astype("int32"))
            write_shard(caching.folder / shard.file, tensors, ShardHeader(shard.key, broken))


def _encoded_texts(caching: Caching, shards: Sequence[Shard]) -> Iterator[Encoded]:
    base_model, each = caching.base_model, caching.config.batch_size
    for shard in shards:
        for first in range(0, len(shard.items), each):
            captions = [caching.rows.captions[item] for item in shard.items[first : first + each]]
            states = encode_tokens(base_model, *tokenize(base_model.tokenizers, captions, base_model.text_length))
            values = {"text_states": states.states}
            if states.pooled is not None:
                values["text_embeds"] = states.pooled
            yield shard, values, [""] * len(captions)


def _encoded_images(caching: Caching, shards: Sequence[Shard]) -> Iterator[Encoded]:
    batches = caching.loader(shards)
    for shard in shards:
        done = 0
        while done < len(shard.items):
            batch = next(batches)
            reasons = batch.pop("broken")
            assert isinstance(reasons, list)
            yield shard, _encode(caching, batch), reasons
            done += len(reasons)


def _encode(caching: Caching, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of views [B, V, ...] -> what the frozen models say, [B, V, ...]."""
    base_model, values = caching.base_model, {}
    for key, views in batch.items():
        flat, shape = views.flatten(0, 1), views.shape[:2]
        if key == "images":
            mean, std = encode_moments(base_model, flat)
            values |= {"latents_mean": mean.unflatten(0, shape), "latents_std": std.unflatten(0, shape)}
        elif key == "clip_images":
            feature = caching.settings.image_feature
            assert feature is not None
            features = encode_clip_images(base_model, flat, feature).unflatten(0, shape)
            if caching.settings.cache_image_features == "int8":
                values["image_features"], values[SCALES] = quantise(features)
            else:
                values["image_features"] = features
        else:
            values[key] = views
    return values


def _kept(value: Tensor, dtype: torch.dtype, shard: Shard, key: str) -> Tensor:
    """A value as it is stored; sizes stay in float32, as float16 has no whole numbers above 2048."""
    exact = value.dtype == torch.int8 or "size" in key or "crop" in key
    kept = value.cpu() if exact else value.to("cpu", dtype)
    if not kept.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise CacheError(
            f"{key} of {shard.file} has values that are not finite in {name}: an encoder overflows in its precision. "
            "Set mixed_precision=no, or check the base model's files."
        )
    return kept
