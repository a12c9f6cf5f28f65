"""Training from a feature cache: the same draws as from images, with what the frozen models said about them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.augmentation import Augmentation, CropParams, SampleIndex, crop_params, noise_params
from ..data.buckets import Buckets
from ..data.dataset import ImageDataset
from ..data.examples import Example
from ..data.face_embeds import face_id_embed
from ..data.images import Size
from ..data.preprocess import Preprocessor, image_tensors, noise_tensors, open_image, reference_tensor
from ..errors import CacheError, DataError
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .files import MANIFEST, SCALES, UNFINISHED, ShardEntry, dequantise, read_manifest, shard_problem
from .plan import Rows
from .settings import Settings, settings_of

_SIZES = ("original_size", "crop_coords_top_left", "target_size")


class Table:
    """The rows of a table, memory-mapped: a row is read when it is used, and processes share what was read."""

    def __init__(self, folder: Path, entries: Sequence[ShardEntry]) -> None:
        self._files = [folder / entry.file for entry in entries]
        self._starts = [entry.start for entry in entries]
        self._mapped: list[dict[str, Tensor] | None] = [None] * len(entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": [None] * len(self._files)}

    def __len__(self) -> int:
        return len(self._files)

    def row(self, number: int) -> dict[str, Tensor]:
        """The tensors of a row. Copy what is kept. Raises CacheError for a shard that cannot be read."""
        shard = bisect_right(self._starts, number) - 1
        place = number - self._starts[shard]
        return {key: tensor[place] for key, tensor in self.shard(shard).items()}

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard."""
        mapped = self._mapped[number]
        if mapped is None:
            mapped = self._mapped[number] = _map(self._files[number])
        return mapped

    def column(self, key: str) -> np.ndarray:
        """A tensor of all shards."""
        return np.concatenate([self.shard(i)[key].numpy() for i in range(len(self._files))])


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache that fits a data set; made by `open_cache`."""

    folder: Path
    settings: Settings
    buckets: Buckets
    rows: Rows
    texts: Table
    references: Table
    images: Table
    place_of: np.ndarray  # int32 [N], of an example in the table of images
    broken: Mapping[str, Mapping[int, str]]  # table -> number -> why it could not be read

    def text(self, row: int, dropped: bool) -> dict[str, Tensor]:
        """`text_states` [L, D] of an example's caption, or of the empty one, and SDXL's `text_embeds` [P]."""
        return self.texts.row(0 if dropped else int(self.rows.caption_of[row]))

    def latents(self, row: int, variant: int, flip: bool) -> dict[str, Tensor]:
        """`latents_mean`, `latents_std` [C, h, w] and the sizes of an example's image.

        Raises DataError when it could not be read.
        """
        tensors = self._image(row)
        keys = ("latents_mean", "latents_std", *_SIZES)
        return {key: self._pick(tensors[key], variant, flip) for key in keys}

    def own_features(self, row: int, variant: int, flip: bool) -> Tensor:
        """`image_features` [E] or [L, E] of an example's image as its own reference. Raises DataError as above."""
        return self._features(self._image(row), variant, flip)

    def reference_features(self, number: int, variant: int, flip: bool) -> Tensor:
        """`image_features` of another image. Raises DataError as above."""
        self._check("references", number)
        return self._features(self.references.row(number), variant, flip)

    def _image(self, row: int) -> dict[str, Tensor]:
        self._check("images", row)
        return self.images.row(int(self.place_of[row]))

    def _check(self, table: str, number: int) -> None:
        if number in self.broken.get(table, {}):
            raise DataError(f"could not be read when the cache was made ({self.broken[table][number]})")

    def _features(self, tensors: Mapping[str, Tensor], variant: int, flip: bool) -> Tensor:
        values = self._pick(tensors["image_features"], variant, flip)
        return dequantise(values, self._pick(tensors[SCALES], variant, flip)) if SCALES in tensors else values

    def _pick(self, variants: Tensor, variant: int, flip: bool) -> Tensor:
        flips = 2 if self.settings.flip else 1
        return variants[(variant * flips + flip) % len(variants)]


class CachedDataset(ImageDataset):
    """The items of a `ImageDataset` over the same examples, from a cache: `latents_mean`, `latents_std`,
    `text_states`, `text_embeds` (SDXL) and `image_features` instead of `images`, `text_input_ids` and `clip_images`.

    Order, noise, timesteps, dropout and flips are the same. The crop is that of an image's use in epoch number
    (epoch modulo `cache_variants`). A cache without image features (`cache_image_features=none`) leaves `clip_images`,
    of the reference that the same use of the images would see, beside the cached crop.
    """

    def __init__(
        self, examples: Sequence[Example], preprocessor: Preprocessor, augmentation: Augmentation, cache: Cache
    ) -> None:
        # Workers need no tokenizers, which are slow to send.
        super().__init__(examples, replace(preprocessor, tokenizers=()), augmentation, cache.buckets)
        self.cache = cache

    def _item(self, row: int, size: Size, index: SampleIndex) -> dict[str, Any]:
        example, key = self.examples[row], index.key(self.augmentation.seed)
        where = crop_params(self.augmentation, key)
        shape = self.preprocessor.latent_shape(size)
        drawn = noise_params(self.augmentation, key, shape, self.preprocessor.num_train_timesteps)
        variant = index.epoch + index.repeat
        latents = self.cache.latents(row, variant, where.flip)
        if latents["latents_mean"].shape != shape:
            raise DataError(f"of another bucket than {size[0]}x{size[1]}")
        item = {**latents, **noise_tensors(drawn), **self.cache.text(row, drawn.drop_text)}
        if self.preprocessor.image_processor is not None:
            item |= self._reference(row, size, variant, where)
        if self.preprocessor.takes_face:
            item["face_id_embed"] = face_id_embed(example, self.preprocessor.face_dim)
        return item

    def _reference(self, row: int, size: Size, variant: int, where: CropParams) -> dict[str, Tensor]:
        numbers = self.cache.rows.references_of[row]
        own = not numbers or where.own_reference
        chosen = 0 if own else int(where.reference * len(numbers))
        if self.cache.settings.image_feature is None:
            return {"clip_images": self._clip_images(row, size, variant, where, None if own else chosen)}
        if own:
            return {"image_features": self.cache.own_features(row, variant, where.flip)}
        return {"image_features": self.cache.reference_features(numbers[chosen], variant, where.flip)}

    def _clip_images(self, row: int, size: Size, variant: int, where: CropParams, chosen: int | None) -> Tensor:
        example, augmentation = self.examples[row], self.augmentation
        if chosen is not None:
            opened, _ = open_image(self.preprocessor, augmentation, size, example.references[chosen])
            return reference_tensor(self.preprocessor, where, opened)
        cached = crop_params(augmentation, (augmentation.seed, variant % self.cache.settings.cache_variants, row))
        where = replace(where, left=cached.left, top=cached.top)
        opened = open_image(self.preprocessor, augmentation, size, example.image)
        return image_tensors(self.preprocessor, augmentation, size, where, opened)["clip_images"]


def open_cache(
    folder: Path, config: TrainConfig, base_model: BaseModel, examples: Sequence[Example], data_hash: str
) -> Cache:
    """Open the cache of a training; no model is loaded.

    Raises CacheError for a folder without finished cache, one that was made of other data, models or settings (naming
    every difference), and for shards that are missing or damaged.
    """
    folder, rows = Path(folder), Rows.of(examples)
    wanted = settings_of(config, base_model, data_hash, len(examples), any_reference=bool(rows.references))
    if not (folder / MANIFEST).is_file():
        found = "was not finished" if (folder / UNFINISHED).is_file() else "holds no cache"
        raise CacheError(f"{folder} {found}. Run `ipadapter cache` with these settings.")
    manifest = read_manifest(folder / MANIFEST)
    if manifest.settings.get("own_references"):  # more than is needed
        wanted = replace(wanted, own_references=True)
    differences = wanted.differences(manifest.settings)
    if differences:
        raise CacheError(
            f"{folder} is the cache of other settings: {'; '.join(differences)}. Set them back, or run `ipadapter "
            "cache` with these and another folder, cache=..."
        )
    entries = [entry for entries in manifest.shards.values() for entry in entries]
    problems = [problem for entry in entries if (problem := shard_problem(folder, entry)) is not None]
    if problems:
        raise CacheError(
            f"{folder}: {'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}. Run `ipadapter cache` "
            "with the same settings again: it makes these again."
        )
    tables = {name: Table(folder, entries) for name, entries in manifest.shards.items()}
    broken = {name: {int(n): why for n, why in reasons.items()} for name, reasons in manifest.broken.items()}
    place_of = np.empty(len(examples), dtype=np.int32)
    place_of[tables["images"].column("row")] = np.arange(len(examples), dtype=np.int32)
    return Cache(
        folder=folder,
        settings=Settings(**{key: manifest.settings[key] for key in asdict(wanted)}),
        buckets=_buckets(tables["images"], broken.get("images", {})),
        rows=rows,
        place_of=place_of,
        broken=broken,
        **tables,
    )


def _buckets(images: Table, broken: Mapping[int, str]) -> Buckets:
    """The buckets of the cached images, without those of which no image could be read."""
    rows: dict[Size, list[int]] = {}
    for number in range(len(images)):
        shard = images.shard(number)
        height, width = (int(side) for side in shard["target_size"][0, 0])
        rows.setdefault((width, height), []).extend(shard["row"].tolist())
    readable = {size: sorted(part) for size, part in rows.items() if any(row not in broken for row in part)}
    return Buckets(tuple(readable), tuple(tuple(part) for part in readable.values()))


def _map(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{file}: cannot be read ({error}). Delete it and run `ipadapter cache` again.") from error
