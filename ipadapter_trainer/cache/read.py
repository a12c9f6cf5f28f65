"""Training from a feature cache: items with the outputs of the frozen models instead of pixels and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.augmentation import CropParams, SampleIndex, crop_params, noise_params
from ..data.buckets import Buckets
from ..data.dataset import ImageDataset
from ..data.examples import Example
from ..data.face_embeds import face_id_embed
from ..data.from_config import augmentation_from_config
from ..data.images import Size, StoredImage
from ..data.preprocess import choose_reference, image_tensors, noise_tensors, open_image, reference_tensor
from ..errors import CacheError, DataError
from ..models.base_model import BaseModel
from ..models.from_config import preprocessor_from_config
from ..settings.config import TrainConfig
from .files import MANIFEST, SIZES, Manifest, open_shard, read_manifest, replaced_image
from .plan import cache_rows, cache_settings
from .quantise import unpack_features

_AGAIN = "Run `ipadapter cache` with the same settings again."


class StoredRows:
    """The tensors of all rows, memory-mapped: only rows that are used are read, and processes share them."""

    def __init__(self, folder: Path, manifest: Manifest, sources: Sequence[Any]) -> None:
        """Raises CacheError for shards that are missing or damaged, or that do not hold all rows of `sources`, and for
        images of another size than when they were cached; DataError when no image could be read.
        """
        count = len(sources)
        self._files, self._settings = [folder / file for file in manifest.shards], manifest.settings
        self._mapped: dict[int, dict[str, Tensor]] = {}  # by each process
        self._place = np.full((count, 2), -1, dtype=np.int32)  # shard and position in it, of each row
        self.broken: dict[int, str] = {}  # rows that could not be read, and why
        buckets: dict[Size, list[int]] = {}
        for number, file in enumerate(self._files):
            tensors, broken = open_shard(file, self._settings)
            rows = tensors["row"].numpy()
            if ((rows < 0) | (rows >= count)).any():
                raise CacheError(f"{file} has rows of other data. {_AGAIN}")
            if replaced := replaced_image(tensors, broken, sources):
                raise CacheError(f"{replaced} {_AGAIN}")
            self._place[rows, 0], self._place[rows, 1] = number, np.arange(len(rows))
            self.broken |= broken
            if "target_size" in tensors:
                height, width = tensors["target_size"][0, 0].int().tolist()
                buckets.setdefault((width, height), []).extend(rows.tolist())
        if (self._place < 0).any():
            missing = int((self._place < 0).any(axis=1).sum())
            raise CacheError(f"{folder} lacks {missing} of its {count} rows. {_AGAIN}")
        readable = {size: sorted(rows) for size, rows in buckets.items() if not self.broken.keys() >= set(rows)}
        if not readable:
            raise DataError(
                f"None of the {sum(map(len, buckets.values()))} images can be read. The first: {self.broken[0]} When "
                "they can be, run `ipadapter cache` with the same settings again."
            )
        self.buckets = Buckets(tuple(readable), tuple(readable.values()))

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned
        return {**self.__dict__, "_mapped": {}}

    def read(self, row: int, variant: int = 0) -> dict[str, Tensor]:
        """The tensors of a variant of a row, whose number may exceed those that there are.

        Raises DataError for a row that could not be read when the cache was made, CacheError for a damaged shard.
        """
        if row in self.broken:
            raise DataError(f"could not be read when the cache was made ({self.broken[row]})")
        shard, position = self._place[row].tolist()
        if shard not in self._mapped:
            self._mapped[shard], _ = open_shard(self._files[shard], self._settings)
        tensors = self._mapped[shard]
        if position >= len(tensors["row"]) or tensors["row"][position] != row:
            raise CacheError(f"{self._files[shard]} was made again meanwhile, with other rows. Start this run again.")
        stored = {key: tensor for key, tensor in tensors.items() if key not in ("row", "file_size")}
        return {key: tensor[position, variant % tensor.shape[1]] for key, tensor in stored.items()}


class CachedDataset(ImageDataset):
    """The items of an `ImageDataset` over the same examples, from a cache: `latents_mean`, `latents_std`,
    `text_states`, `text_embeds` (SDXL) and `image_features` instead of `images`, `text_input_ids` and `clip_images`.

    Order, noise, timesteps, dropout and flips are the same; the random crop of epoch e is that of epoch e modulo
    `cache_variants`. From a cache without image features (`cache_image_features=none`), items have `clip_images` of
    the cached crop, made from the images. No model is loaded.

    Raises CacheError for a folder without a complete cache, for one of other data, models or settings (naming every
    difference), for shards that are missing or damaged, and for images that were replaced since.
    """

    def __init__(self, config: TrainConfig, base_model: BaseModel, examples: Sequence[Example]) -> None:
        folder = config.cache
        if folder is None or not (folder / MANIFEST).is_file():
            raise CacheError(f"{folder} holds no cache. Run `ipadapter cache` with these settings.")
        manifest = read_manifest(folder, cache_settings(config, examples, base_model))
        self.settings = manifest.settings
        sources = cache_rows(self.settings, examples)
        self.stored = StoredRows(folder, manifest, sources)
        self._row_of = {source: row for row, source in enumerate(sources)}  # of captions and references
        # Workers need no tokenizers, which are slow to send.
        preprocessor = replace(preprocessor_from_config(config, base_model), tokenizers=())
        super().__init__(examples, preprocessor, augmentation_from_config(config), self.stored.buckets)

    def _item(self, row: int, size: Size, index: SampleIndex) -> dict[str, Any]:
        example, key = self.examples[row], index.key(self.augmentation.seed)
        crop = crop_params(self.augmentation, key)
        shape = self.preprocessor.latent_shape(size)
        noise = noise_params(self.augmentation, key, shape, self.preprocessor.num_train_timesteps)
        epoch = index.epoch + index.repeat
        variant = 2 * epoch + crop.flip if self.augmentation.flip else epoch
        image = self.stored.read(row, variant)
        if image["latents_mean"].shape != shape:
            raise DataError(f"of another bucket than {size[0]}x{size[1]}")
        item: dict[str, Any] = {name: image[name] for name in ("latents_mean", "latents_std", *SIZES)}
        item |= self.stored.read(self._row_of["" if noise.drop_text else example.text])
        item |= noise_tensors(noise)
        if self.preprocessor.image_processor is not None:
            reference = choose_reference(crop, example.references)
            if self.settings["image_feature"] is None:
                item["clip_images"] = self._clip_images(row, size, epoch, crop, reference)
            elif reference is None:
                item["image_features"] = unpack_features(image)
            else:
                item["image_features"] = unpack_features(self.stored.read(self._row_of[reference], variant))
        if self.preprocessor.takes_face:
            item["face_id_embed"] = face_id_embed(example, self.preprocessor.face_dim)
        return item

    def _clip_images(self, row: int, size: Size, epoch: int, crop: CropParams, reference: StoredImage | None) -> Tensor:
        preprocessor, augmentation = self.preprocessor, self.augmentation
        image = self.examples[row].image if reference is None else reference
        opened = open_image(preprocessor, augmentation, size, image)
        if reference is not None:
            return reference_tensor(preprocessor, crop, opened[0])
        cached = crop_params(augmentation, (augmentation.seed, epoch % self.settings["cache_variants"], row))
        crop = replace(crop, left=cached.left, top=cached.top)
        return image_tensors(preprocessor, augmentation, size, crop, opened)["clip_images"]
