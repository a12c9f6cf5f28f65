"""Training from a feature cache: items with the outputs of the frozen models instead of pixels and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
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
from .files import MANIFEST, Manifest, check_shards, read_manifest
from .plan import SIZES, TABLES, CacheSettings, distinct_captions, distinct_references
from .quantise import unpack_features


class Table:
    """The rows of a table, memory-mapped: only rows that are used are read, and processes share them."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        """Raises CacheError when the shards do not hold all rows."""
        self.files = [folder / file for file in manifest.shards if file.startswith(f"{name}/")]
        self._mapped: dict[int, dict[str, Tensor]] = {}  # by each process
        rows_of = [map_shard(file)["row"].numpy() for file in self.files]
        count = sum(map(len, rows_of))
        if count != manifest.counts.get(name):
            raise CacheError(f"{folder / MANIFEST}: not a cache's manifest (it is damaged). Make the cache again.")
        self._place = np.empty((count, 2), dtype=np.int32)  # shard and position in it, of each row
        for shard, rows in enumerate(rows_of):
            self._place[rows, 0], self._place[rows, 1] = shard, np.arange(len(rows))

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned
        return {**self.__dict__, "_mapped": {}}

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The tensors of a row. Raises CacheError for a shard that cannot be read."""
        shard, position = self._place[row].tolist()
        if shard not in self._mapped:
            self._mapped[shard] = map_shard(self.files[shard])
        return {key: tensor[position] for key, tensor in self._mapped[shard].items() if key != "row"}


class CachedDataset(ImageDataset):
    """The items of an `ImageDataset` over the same examples, from a cache: `latents_mean`, `latents_std`,
    `text_states`, `text_embeds` (SDXL) and `image_features` instead of `images`, `text_input_ids` and `clip_images`.

    Order, noise, timesteps, dropout and flips are the same; the random crop of epoch e is that of epoch e modulo
    `cache_variants`. From a cache without image features (`cache_image_features=none`), items have `clip_images` of
    the cached crop, made from the images. No model is loaded.

    Raises CacheError for a folder without a complete cache, for one of other data, models or settings (naming every
    difference), and for shards that are missing or damaged.
    """

    def __init__(self, config: TrainConfig, base_model: BaseModel, examples: Sequence[Example]) -> None:
        folder = config.cache
        if folder is None or not (folder / MANIFEST).is_file():
            raise CacheError(f"{folder} holds no cache. Run `ipadapter cache` with these settings.")
        manifest = read_manifest(folder)
        self.settings = CacheSettings.of(config, examples, base_model)
        if manifest.settings.own_references:  # more features than are needed do no harm
            self.settings = replace(self.settings, own_references=True)
        if differences := self.settings.differences(manifest.settings):
            raise CacheError(
                f"{folder} is the cache of other settings: {differences}. Set them back, or run `ipadapter cache` with "
                "these and another folder, cache=..."
            )
        check_shards(folder, manifest)
        self.tables = {table: Table(folder, table, manifest) for table in TABLES}
        self.broken = manifest.broken  # table -> row -> why it could not be read
        self._caption_rows = {text: row for row, text in enumerate(distinct_captions(examples))}
        self._reference_rows = {reference: row for row, reference in enumerate(distinct_references(examples))}
        # Workers need no tokenizers, which are slow to send.
        preprocessor = replace(preprocessor_from_config(config, base_model), tokenizers=())
        super().__init__(examples, preprocessor, augmentation_from_config(config), self._buckets(base_model))

    def _buckets(self, base_model: BaseModel) -> Buckets:
        """The buckets of the cached images, without those of which no image could be read."""
        broken = self.broken.get("images", {})
        buckets: dict[Size, list[int]] = {}
        for shard in map(map_shard, self.tables["images"].files):
            height, width = (side * base_model.latent_scale for side in shard["latents_mean"].shape[-2:])
            buckets.setdefault((width, height), []).extend(shard["row"].tolist())
        readable = {size: tuple(sorted(rows)) for size, rows in buckets.items() if not broken.keys() >= set(rows)}
        return Buckets(tuple(readable), tuple(readable.values()))

    def _item(self, row: int, size: Size, index: SampleIndex) -> dict[str, Any]:
        example, key = self.examples[row], index.key(self.augmentation.seed)
        crop = crop_params(self.augmentation, key)
        shape = self.preprocessor.latent_shape(size)
        noise = noise_params(self.augmentation, key, shape, self.preprocessor.num_train_timesteps)
        variant = index.epoch + index.repeat
        image = self._read("images", row, variant, crop.flip)
        if image["latents_mean"].shape != shape:
            raise DataError(f"of another bucket than {size[0]}x{size[1]}")
        caption = self.tables["captions"][self._caption_rows["" if noise.drop_text else example.text]]
        item = {
            **{name: image[name] for name in ("latents_mean", "latents_std", *SIZES)},
            **{name: caption[name] for name in ("text_states", "text_embeds") if name in caption},
            **noise_tensors(noise),
        }
        if self.preprocessor.image_processor is not None:
            reference = choose_reference(crop, example.references)
            if self.settings.image_feature is None:
                item["clip_images"] = self._clip_images(row, size, variant, crop, reference)
            elif reference is None:
                item["image_features"] = unpack_features(image)
            else:
                stored = self._read("references", self._reference_rows[reference], variant, crop.flip)
                item["image_features"] = unpack_features(stored)
        if self.preprocessor.takes_face:
            item["face_id_embed"] = face_id_embed(example, self.preprocessor.face_dim)
        return item

    def _read(self, table: str, row: int, variant: int, flip: bool) -> dict[str, Tensor]:
        """A variant of a row. Raises DataError for a row that could not be read when the cache was made."""
        if row in self.broken.get(table, {}):
            raise DataError(f"could not be read when the cache was made ({self.broken[table][row]})")
        number = 2 * variant + flip if self.settings.flip else variant
        return {key: variants[number % len(variants)] for key, variants in self.tables[table][row].items()}

    def _clip_images(
        self, row: int, size: Size, variant: int, crop: CropParams, reference: StoredImage | None
    ) -> Tensor:
        augmentation = self.augmentation
        if reference is not None:
            opened, _ = open_image(self.preprocessor, augmentation, size, reference)
            return reference_tensor(self.preprocessor, crop, opened)
        cached = crop_params(augmentation, (augmentation.seed, variant % self.settings.cache_variants, row))
        crop = replace(crop, left=cached.left, top=cached.top)
        opened = open_image(self.preprocessor, augmentation, size, self.examples[row].image)
        return image_tensors(self.preprocessor, augmentation, size, crop, opened)["clip_images"]


def map_shard(file: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of a shard. Raises CacheError when it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{file}: cannot be read ({error}). Delete it and run `ipadapter cache` again.") from error
