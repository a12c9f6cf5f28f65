"""Pictures and captions -> batches.

What a draw holds is a function of (seed, epoch, row) and of nothing else, so neither the number of workers
nor a resume changes a training.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .base_model import BaseModel
from .config import TrainConfig
from .errors import DataError
from .examples import Example
from .objective import dropout


class Draw(NamedTuple):
    """One use of one example."""

    epoch: int
    row: int


class Batch(TypedDict):
    """A batch under the original trainer's names, and the files that could not be read for it."""

    images: Tensor  # [B, 3, R, R] in [-1, 1]
    clip_images: Tensor  # [B, 3, S, S], normalised for the image encoder
    text_input_ids: Tensor  # int64 [B, L]
    drop_image_embeds: Tensor  # int64 [B], 1 drops
    broken: list[str]


@dataclass(frozen=True)
class Recipe:
    """How an example becomes a training item; the shares and the flip as in `TrainConfig`."""

    resolution: int
    seed: int = 0
    flip: bool = False
    image_dropout: float = 0.05
    text_dropout: float = 0.05
    both_dropout: float = 0.05


class PictureDataset(Dataset[dict[str, Any]]):
    """Items of a sequence of examples, asked for by `Draw`; `loader` makes batches of them.

    A picture that cannot be read is replaced by the next readable one, and named in the item's `broken`.
    """

    def __init__(self, examples: Sequence[Example], base_model: BaseModel, recipe: Recipe) -> None:
        self.examples = examples
        self.recipe = recipe
        # Only what preparing a picture needs: workers must not get the models.
        self._processor = base_model.image_processor
        self._tokenizer = base_model.tokenizer
        self._text_length = base_model.text_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        epoch, row = (0, draw) if isinstance(draw, int) else draw
        broken: list[str] = []
        for offset in range(len(self)):
            example = self.examples[(row + offset) % len(self)]
            try:
                picture = _open(example.image)
                reference = picture if example.reference is None else _open(example.reference)
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                broken.append(f"{example.name}: {type(error).__name__}: {error}")
                continue
            return {**self._item(picture, reference, example.text, Draw(epoch, row)), "broken": broken}
        raise DataError(f"None of the {len(self)} pictures can be read. The first: {broken[0]}")

    def _item(self, picture: Image.Image, reference: Image.Image, text: str, draw: Draw) -> dict[str, Any]:
        recipe = self.recipe
        uniform = random.Random(f"{recipe.seed}/{draw.epoch}/{draw.row}")
        drop_image, drop_text = dropout(
            uniform.random(), image=recipe.image_dropout, text=recipe.text_dropout, both=recipe.both_dropout
        )
        if recipe.flip and uniform.random() < 0.5:
            picture, reference = ImageOps.mirror(picture), ImageOps.mirror(reference)
        return {
            "images": to_tensor(resize_and_crop(picture, recipe.resolution)),
            "clip_images": self._processor(images=reference, return_tensors="pt").pixel_values[0],
            "text_input_ids": self._tokenizer(
                "" if drop_text else text,
                padding="max_length",
                truncation=True,
                max_length=self._text_length,
                return_tensors="pt",
            ).input_ids[0],
            "drop_image_embeds": int(drop_image),
        }


class ShuffledDraws(Sampler[Draw]):
    """Endless draws, epoch after epoch, each in an order of its own, from the draw number `start` on."""

    def __init__(self, length: int, seed: int, start: int = 0) -> None:
        self._length, self._seed, self._start = length, seed, start

    def __iter__(self) -> Iterator[Draw]:
        epoch, skip = divmod(self._start, self._length)
        while True:
            number = random.Random(f"{self._seed}/{epoch}/order").getrandbits(63)
            order = torch.randperm(self._length, generator=torch.Generator().manual_seed(number))
            for row in order[skip:].tolist():
                yield Draw(epoch, row)
            epoch, skip = epoch + 1, 0


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Stack items into a batch."""
    return Batch(
        images=torch.stack([item["images"] for item in items]),
        clip_images=torch.stack([item["clip_images"] for item in items]),
        text_input_ids=torch.stack([item["text_input_ids"] for item in items]),
        drop_image_embeds=torch.tensor([item["drop_image_embeds"] for item in items]),
        broken=[line for item in items for line in item["broken"]],
    )


def loader(dataset: PictureDataset, config: TrainConfig, start: int = 0, pin: bool = False) -> DataLoader[Batch]:
    """Endless batches from the draw number `start` on; `pin` speeds up the copy to a GPU."""
    # Set before workers are forked: a fast tokenizer complains, and may hang, when it is forked in parallel
    # mode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=ShuffledDraws(len(dataset), config.seed, start),
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # else a worker's seed is drawn from the global generator
    )


def resize_and_crop(picture: Image.Image, side: int) -> Image.Image:
    """Scale the short side to `side` (bilinear) and cut the centre square, as the original does."""
    width, height = picture.size
    scale = side / min(width, height)
    resized = picture.resize((max(side, int(width * scale)), max(side, int(height * scale))), Image.Resampling.BILINEAR)
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    return resized.crop((left, top, left + side, top + side))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright, in RGB, transparency over white (dropping it would uncover whatever colour lies beneath)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    with Image.open(image) as picture:
        return to_rgb(picture)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process alone decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
