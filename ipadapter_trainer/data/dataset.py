"""Examples -> batches, in worker processes."""

from __future__ import annotations

import os
import signal
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import CacheError, DataError
from .augmentation import Augmentation, SampleIndex
from .buckets import BucketBatchSampler, Buckets
from .examples import Example
from .images import Size, why_unreadable
from .preprocess import Preprocessor, check_image_size, preprocess


class _EveryBatch(TypedDict):
    original_size: Tensor  # float32 [B, 2], (height, width) of the image in the file
    crop_coords_top_left: Tensor  # float32 [B, 2], (top, left) of the crop in the resized image
    target_size: Tensor  # float32 [B, 2], (height, width) of `images`
    drop_image_embeds: Tensor  # int64 [B], 1 drops
    noise: Tensor  # float32 [B, C, h, w], with the noise offset
    posterior_noise: Tensor  # float32 [B, C, h, w], to sample the VAE's posterior
    timesteps: Tensor  # int64 [B]
    broken: list[str]  # a line for each file that could not be read


class Batch(_EveryBatch, total=False):
    """A batch, with the original trainer's names."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    clip_images: Tensor  # [B, 3, S, S], normalised for the image encoder; only for kinds that take an image
    face_id_embed: Tensor  # [B, F]; only for kinds that take a face
    text_input_ids: Tensor  # int64 [B, L]
    text_input_ids_2: Tensor  # int64 [B, L]; only for a base model with a second tokenizer (SDXL)
    # From a cache, instead of `images`, `text_input_ids` and `clip_images`.
    latents_mean: Tensor  # [B, C, h, w]
    latents_std: Tensor
    text_states: Tensor  # [B, L, D]
    text_embeds: Tensor  # [B, P]
    image_features: Tensor  # [B, E] or [B, L, E]


class ImageDataset(Dataset[dict[str, Any]]):
    """Rows of a batch, indexed by `SampleIndex`; a number is a row in epoch 0.

    An example that cannot be read is replaced by the next readable one of its bucket and named in the item's `broken`.

    Raises ConfigError for a size that is no multiple of the pixels per latent, DataError without examples and, from
    an item, when no image can be read.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessor: Preprocessor,
        augmentation: Augmentation,
        buckets: Buckets | None = None,
    ) -> None:
        if not examples:
            raise DataError("No images: the data set is empty.")
        self.examples = examples
        self.preprocessor = preprocessor
        self.augmentation = augmentation
        self.buckets = buckets or Buckets.square(augmentation.resolution, len(examples))
        self._bucket_of = [0] * len(examples)
        for bucket, rows in enumerate(self.buckets.rows):
            for row in rows:
                self._bucket_of[row] = bucket
        for size in self.buckets.sizes:
            check_image_size(size, preprocessor)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: SampleIndex | int) -> dict[str, Any]:
        index = SampleIndex(0, index) if isinstance(index, int) else index
        size = self.buckets.sizes[self._bucket_of[index.row]]
        broken: list[str] = []
        for row in self._candidates(index.row):
            try:
                item = self._item(row, size, index)
            except CacheError:
                raise
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                broken.append(f"{self.examples[row].name}: {why_unreadable(error)}")
            else:
                return {**item, "broken": broken}
        raise DataError(f"None of the {len(self)} images can be read. The first: {broken[0]}")

    def _item(self, row: int, size: Size, index: SampleIndex) -> dict[str, Any]:
        key = index.key(self.augmentation.seed)
        return preprocess(self.preprocessor, self.augmentation, size, key, self.examples[row])

    def _candidates(self, row: int) -> Iterator[int]:
        """The row itself, the other rows of its bucket, and all other rows."""
        bucket = self._bucket_of[row]
        rows = self.buckets.rows[bucket]
        first = bisect_left(rows, row)
        yield from (rows[(first + i) % len(rows)] for i in range(len(rows)))
        yield from (other for other in range(len(self)) if self._bucket_of[other] != bucket)


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Stack items into a batch."""
    batch: dict[str, Any] = {
        key: torch.stack([item[key] for item in items])
        if isinstance(value, Tensor)
        else torch.tensor([item[key] for item in items])
        for key, value in items[0].items()
        if key != "broken"
    }
    return Batch(**batch, broken=[line for item in items for line in item["broken"]])


def loader(
    dataset: ImageDataset,
    batches: BucketBatchSampler,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 4,
    pin: bool = False,
) -> DataLoader[Batch]:
    """The endless batches of one process: its `batch_size` rows of each global batch. `pin` pins memory, for faster
    copies to a GPU.

    Raises ValueError when the processes' batches do not make up a global batch.
    """
    if batch_size * processes != batches.global_batch:
        raise ValueError(f"{processes} x {batch_size} rows are not a global batch of {batches.global_batch}")
    part = slice(process * batch_size, (process + 1) * batch_size)
    return DataLoader(
        cast("Dataset[Batch]", dataset),
        batch_sampler=(indices[part] for indices in batches),
        collate_fn=collate,
        **worker_options(num_workers, pin),
    )


def worker_options(num_workers: int, pin: bool) -> dict[str, Any]:
    """The arguments of a `DataLoader` that concern its worker processes."""
    # Set before workers are forked: a fast tokenizer that is forked after use warns, and may hang.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return {
        "num_workers": num_workers,
        "pin_memory": pin,
        "worker_init_fn": _ignore_interrupts,
        "generator": torch.Generator().manual_seed(0),  # otherwise seeds come from the global generator
    }


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the training process reacts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
