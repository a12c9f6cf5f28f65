"""Pictures and captions -> batches, in worker processes.

What a draw holds is a function of (seed, epoch, row) and of nothing else (`draws`), so neither the number of workers
and processes nor a resume changes a training.
"""

from __future__ import annotations

import os
import signal
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import CacheError, ConfigError, DataError
from .buckets import Buckets, GlobalBatches, ProcessBatches
from .draws import Address, Draw, Geometry, Randomness, Recipe, geometry, randomness
from .examples import Example
from .face_embeds import face_id_embed as read_face_id_embed
from .pixels import Picture, Size, cover_and_crop, open_rgb, share_of, to_rgb, to_tensor, why_broken

__all__ = [
    "Batch",
    "Draw",
    "Encoding",
    "GlobalBatches",
    "PictureDataset",
    "Recipe",
    "collate",
    "geometry",
    "loader",
    "make_item",
    "randomness",
    "to_rgb",
    "to_tensor",
]


class Batch(TypedDict, total=False):
    """A batch under the original trainer's names, and the files that could not be read for it."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    clip_images: Tensor  # [B, 3, S, S], normalised for the image encoder; only for kinds that take a picture
    face_id_embed: Tensor  # [B, F]; only for kinds that take a face
    text_input_ids: Tensor  # int64 [B, L]
    text_input_ids_2: Tensor  # int64 [B, L]; only for a base model with a second tokenizer (SDXL)
    original_size: Tensor  # float32 [B, 2], (height, width) of the file's picture
    crop_coords_top_left: Tensor  # float32 [B, 2], (top, left) of the cut in the resized picture
    target_size: Tensor  # float32 [B, 2], (height, width) of `images`
    drop_image_embeds: Tensor  # int64 [B], 1 drops
    noise: Tensor  # float32 [B, C, h, w], to be predicted; noise offset included
    posterior_noise: Tensor  # float32 [B, C, h, w], for the draw of the VAE's posterior
    timesteps: Tensor  # int64 [B]
    broken: list[str]
    # From a cache, instead of `images`, `text_input_ids` and `clip_images`.
    latents_mean: Tensor  # [B, C, h, w]
    latents_std: Tensor
    text_states: Tensor  # [B, L, D]
    text_embeds: Tensor  # [B, P]
    image_features: Tensor  # [B, E] or [B, L, E]


@dataclass(frozen=True, eq=False)
class Encoding:
    """What preparing an example needs of a base model and of a kind of adapter; workers get this and no model."""

    tokenizers: tuple[Any, ...]  # one, or two for SDXL
    text_length: int
    image_processor: Any | None = None  # None: the kind takes no picture
    latent_scale: int = 8
    latent_channels: int = 4
    num_train_timesteps: int = 1000
    takes_face: bool = False
    face_width: int = 512

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of a picture's latents."""
        return self.latent_channels, size[1] // self.latent_scale, size[0] // self.latent_scale


class PictureDataset(Dataset[dict[str, Any]]):
    """Items of a sequence of examples, asked for by `Draw`; `loader` makes batches of them.

    A picture that cannot be read is replaced by the next readable one of its bucket, and named in the item's
    `broken`. So is one without a face embedding (`face_embeds.with_faces`), if the encoding takes one.

    Raises ConfigError for a size that is no multiple of the pixels per latent, DataError without examples and, from
    an item, when not a single picture can be read.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoding: Encoding,
        recipe: Recipe,
        buckets: Buckets | None = None,
    ) -> None:
        if not examples:
            raise DataError("No pictures: the data set is empty.")
        self.examples = examples
        self.encoding = encoding
        self.recipe = recipe
        self.buckets = buckets or Buckets.square(recipe.resolution, len(examples))
        self._bucket_of = [0] * len(examples)
        for bucket, rows in enumerate(self.buckets.rows):
            for row in rows:
                self._bucket_of[row] = bucket
        for size in self.buckets.sizes:
            check_size(size, encoding)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        draw = Draw(0, draw) if isinstance(draw, int) else draw
        size = self.buckets.sizes[self._bucket_of[draw.row]]
        broken: list[str] = []
        for row in self._replacements(draw.row):
            example = self.examples[row]
            try:
                item = self._item(row, size, draw)
            except CacheError:
                raise
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                broken.append(f"{example.name}: {why_broken(error)}")
                continue
            return {**item, "broken": broken}
        raise DataError(f"None of the {len(self)} pictures can be read. The first: {broken[0]}")

    def _item(self, row: int, size: Size, draw: Draw) -> dict[str, Any]:
        example, address = self.examples[row], draw.address(self.recipe.seed)
        return make_item(
            self.encoding,
            self.recipe,
            size,
            address,
            example.image,
            example.text,
            example.references,
            self._face_id_embed(example),
        )

    def _face_id_embed(self, example: Example) -> Tensor | None:
        return read_face_id_embed(example, self.encoding.face_width) if self.encoding.takes_face else None

    def _replacements(self, row: int) -> Iterator[int]:
        """The row itself, the others of its bucket, and all others."""
        bucket = self._bucket_of[row]
        rows = self.buckets.rows[bucket]
        place = bisect_left(rows, row)
        yield from (rows[(place + i) % len(rows)] for i in range(len(rows)))
        yield from (other for other in range(len(self)) if self._bucket_of[other] != bucket)


def make_item(
    encoding: Encoding,
    recipe: Recipe,
    size: Size,
    address: Address,
    image: Picture,
    text: str,
    references: Sequence[Picture] = (),
    face_id_embed: Tensor | None = None,
) -> dict[str, Any]:
    """One row of a `Batch`, with `images` of the given size (width, height)."""
    drawn = randomness(recipe, address, encoding.latent_shape(size), encoding.num_train_timesteps)
    item: dict[str, Any] = {
        **picture_tensors(
            encoding, recipe, size, geometry(recipe, address), open_picture(encoding, recipe, size, image), references
        ),
        **drawn_values(drawn),
    }
    for key, tokenizer in zip(("text_input_ids", "text_input_ids_2"), encoding.tokenizers, strict=False):
        item[key] = tokenize(tokenizer, "" if drawn.drop_text else text, encoding.text_length)
    if encoding.takes_face:
        item["face_id_embed"] = face_id_embed
    return item


def open_picture(encoding: Encoding, recipe: Recipe, size: Size, picture: Picture) -> tuple[Image.Image, Size]:
    """The picture, upright, with as many pixels as targets of `size` and the image encoder can use, and the size of
    the file's picture.
    """
    return open_rgb(picture, _enough_pixels(encoding, recipe, size))


def picture_tensors(
    encoding: Encoding,
    recipe: Recipe,
    size: Size,
    where: Geometry,
    opened: tuple[Image.Image, Size],
    references: Sequence[Picture] = (),
) -> dict[str, Tensor]:
    """What a row shows: `images` of the given size (width, height), the sizes, and `clip_images` of its reference."""
    picture, (width, height) = opened
    if where.flip:
        picture = ImageOps.mirror(picture)
    cut = cover_and_crop(picture, size, where.left, where.top)
    tensors = {
        "images": to_tensor(cut.picture),
        "original_size": torch.tensor([height, width], dtype=torch.float32),
        "crop_coords_top_left": torch.tensor(cut.top_left, dtype=torch.float32),
        "target_size": torch.tensor(size[::-1], dtype=torch.float32),
    }
    if encoding.image_processor is None:
        return tensors
    if not references or where.own_reference:
        # A picture that is its own reference shows what the target shows; the encoder cuts the centre by itself.
        own = picture.crop(cut.box) if recipe.crop == "random" else picture
        return {**tensors, "clip_images": _clip_image(encoding, own, where)}
    reference, _ = open_picture(encoding, recipe, size, references[int(where.reference * len(references))])
    return {**tensors, "clip_images": reference_tensor(encoding, where, reference)}


def reference_tensor(encoding: Encoding, where: Geometry, reference: Image.Image) -> Tensor:
    """`clip_images` of a row whose reference is another picture."""
    return _clip_image(encoding, ImageOps.mirror(reference) if where.flip else reference, where)


def drawn_values(drawn: Randomness) -> dict[str, Any]:
    """What a row draws, by the names of a `Batch`."""
    return {
        "drop_image_embeds": int(drawn.drop_image),
        "noise": drawn.noise,
        "posterior_noise": drawn.posterior_noise,
        "timesteps": drawn.timestep,
    }


def tokenize(tokenizer: Any, text: str, length: int) -> Tensor:
    """Token ids int64 [L], padded or cut."""
    return tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids[0]


def _clip_image(encoding: Encoding, reference: Image.Image, where: Geometry) -> Tensor:
    if where.reference_area < 1:
        reference = share_of(reference, where.reference_area, where.reference_left, where.reference_top)
    assert encoding.image_processor is not None
    return encoding.image_processor(images=reference, return_tensors="pt").pixel_values[0]


def _enough_pixels(encoding: Encoding, recipe: Recipe, size: Size) -> int:
    """The short side from which a picture is still scaled down to half, by target and image encoder."""
    side = max(size)
    if encoding.image_processor is not None:
        crop = encoding.image_processor.crop_size
        side = max(side, int((crop if isinstance(crop, int) else crop["height"]) / recipe.reference_crop**0.5))
    return 2 * side


def check_size(size: Size, encoding: Encoding) -> None:
    """Raises ConfigError for a picture whose latents would have a fraction of a row."""
    if size[0] % encoding.latent_scale or size[1] % encoding.latent_scale:
        raise ConfigError(
            f"Pictures of {size[0]}x{size[1]} pixels: both sides must be multiples of {encoding.latent_scale}, the "
            "pixels per latent. Change resolution or bucket_step."
        )


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
    dataset: PictureDataset,
    batches: GlobalBatches,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    workers: int = 4,
    pin: bool = False,
) -> DataLoader[Batch]:
    """The endless batches of one process: its `batch_size` rows of each global batch. `pin` speeds up the copy to a
    GPU.

    Raises ValueError when the processes' batches do not make up a global batch.
    """
    if batch_size * processes != batches.global_batch:
        raise ValueError(f"{processes} x {batch_size} rows are not a global batch of {batches.global_batch}")
    return DataLoader(
        dataset,
        batch_sampler=ProcessBatches(batches, batch_size, process),
        collate_fn=collate,
        **worker_options(workers, pin),
    )


def worker_options(workers: int, pin: bool) -> dict[str, Any]:
    """The arguments of a `DataLoader` that have to do with its worker processes."""
    # Set before workers are forked: a fast tokenizer complains, and may hang, when it is forked in parallel
    # mode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return {
        "num_workers": workers,
        "pin_memory": pin,
        "worker_init_fn": _ignore_interrupts,
        "generator": torch.Generator().manual_seed(0),  # else a worker's seed is drawn from the global generator
    }


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
