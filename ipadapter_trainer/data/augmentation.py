"""Everything that is random about one use of an example.

It is a function of the use's address and of nothing else: not of the number of processes or workers, not of what was
drawn before. So none of them, and no resume, changes a training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Uniform = TypeVar("Uniform", float, Tensor)  # draws from [0, 1)


RandomKey = tuple[int, int, int | str]  # seed, epoch, and the row of an example or the name of a sample


class SampleIndex(NamedTuple):
    """One use of one example. `repeat` counts its uses within the epoch, where it fills up a batch."""

    epoch: int
    row: int
    repeat: int = 0

    def address(self, seed: int) -> RandomKey:
        """Where the draw's randomness comes from."""
        return seed, self.epoch, f"{self.row} again {self.repeat}" if self.repeat else self.row


@dataclass(frozen=True)
class Augmentation:
    """How an example becomes a training item; every field as in `TrainConfig`."""

    resolution: int
    seed: int = 0
    flip: bool = False
    crop: Literal["center", "random"] = "center"
    image_dropout: float = 0.05
    text_dropout: float = 0.05
    both_dropout: float = 0.05
    noise_offset: float = 0.0
    reference_crop: float = 1.0
    self_reference: float = 0.0


@dataclass(frozen=True)
class CropParams:
    """Which pixels are seen. Positions are shares in [0, 1], so that they fit an image of any size."""

    left: float  # share of what is cut off that lies to the left of the cut
    top: float
    flip: bool
    own_reference: bool  # the image is its own reference although it has others
    reference: float  # picks one of the references
    reference_area: float  # share of the reference's pixels that is kept
    reference_left: float
    reference_top: float


@dataclass(frozen=True, eq=False)
class NoiseParams:
    """What is dropped, and the noise."""

    drop_image: bool
    drop_text: bool
    noise: Tensor  # float32 [C, h, w], noise offset included
    posterior_noise: Tensor  # float32 [C, h, w]
    timestep: int


def crop_params(augmentation: Augmentation, address: RandomKey) -> CropParams:
    """The pixels that a use sees."""
    uniform = _uniform(address, "geometry")
    # All are always drawn, so that turning one option on changes nothing else.
    left, top, flip, own, reference, area, reference_left, reference_top = (uniform.random() for _ in range(8))
    return CropParams(
        left=left if augmentation.crop == "random" else 0.5,
        top=top if augmentation.crop == "random" else 0.5,
        flip=augmentation.flip and flip < 0.5,
        own_reference=own < augmentation.self_reference,
        reference=reference,
        reference_area=1 - area * (1 - augmentation.reference_crop),
        reference_left=reference_left,
        reference_top=reference_top,
    )


def noise_params(
    augmentation: Augmentation, address: RandomKey, latent_shape: tuple[int, int, int], num_train_timesteps: int = 1000
) -> NoiseParams:
    """Dropout (paper, section 3.2.3), noise [C, h, w] and timestep of a use.

    Noise offset adds a constant of its own to each channel (tutorial_train_sdxl.py).
    """
    uniform = _uniform(address, "noise")
    drop_image, drop_text = dropout(
        uniform.random(),
        image=augmentation.image_dropout,
        text=augmentation.text_dropout,
        both=augmentation.both_dropout,
    )
    timestep = uniform.randrange(num_train_timesteps)
    generator = torch.Generator().manual_seed(uniform.getrandbits(63))
    noise = torch.randn(latent_shape, generator=generator)
    posterior_noise = torch.randn(latent_shape, generator=generator)
    if augmentation.noise_offset:
        noise = noise + augmentation.noise_offset * torch.randn(latent_shape[0], 1, 1, generator=generator)
    return NoiseParams(bool(drop_image), bool(drop_text), noise, posterior_noise, timestep)


def _uniform(address: RandomKey, purpose: str) -> random.Random:
    seed, epoch, place = address
    return random.Random(f"{seed}/{epoch}/{place}/{purpose}")


def dropout(
    draw: Uniform, *, image: float = 0.05, text: float = 0.05, both: float = 0.05
) -> tuple[bool | Tensor, bool | Tensor]:
    """One uniform draw in [0, 1), or a tensor of them, decides: (drop the image, drop the text).

    The order of the original: [0, image) image, then text, then both, the rest keeps both.
    """
    end = image + text
    in_both = (draw >= end) & (draw < end + both)
    return (draw < image) | in_both, ((draw >= image) & (draw < end)) | in_both
