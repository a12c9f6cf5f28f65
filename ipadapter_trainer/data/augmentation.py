"""Random crops, flips, dropout and noise.

All randomness of a sample derives from its random key, as from a key in JAX. So it depends neither on the number of
processes and workers nor on a resume.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RandomKey = tuple[int, int, int | str]  # seed, epoch, and the row of an example or the name of a sample


class SampleIndex(NamedTuple):
    """One use of an example. `repeat` counts its uses within the epoch, where it fills up a batch."""

    epoch: int
    row: int
    repeat: int = 0

    def key(self, seed: int) -> RandomKey:
        """The random key of this use."""
        return seed, self.epoch, f"{self.row} again {self.repeat}" if self.repeat else self.row


@dataclass(frozen=True)
class Augmentation:
    """The fields of `TrainConfig` that decide how an example is cropped, flipped, dropped and made noisy."""

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
    """Which pixels are used. Positions are fractions in [0, 1] of what is cut off, so they fit any image size."""

    left: float
    top: float
    flip: bool
    own_reference: bool  # the image is its own reference although it has others
    reference: float  # in [0, 1), selects one of the references
    reference_area: float  # fraction of the reference's pixels that is kept
    reference_left: float
    reference_top: float


@dataclass(frozen=True, eq=False)
class NoiseParams:
    """Dropout and noise of a sample."""

    drop_image: bool
    drop_text: bool
    noise: Tensor  # float32 [C, h, w], noise offset included
    posterior_noise: Tensor  # float32 [C, h, w], to sample the VAE's posterior
    timestep: int


def crop_params(augmentation: Augmentation, key: RandomKey) -> CropParams:
    """Crop and flip of a sample, and its reference."""
    rng = _generator(key, "geometry")
    # All numbers are always drawn, so that turning on one option does not change the others.
    left, top, flip, own, reference, area, reference_left, reference_top = (rng.random() for _ in range(8))
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
    augmentation: Augmentation, key: RandomKey, latent_shape: tuple[int, int, int], num_train_timesteps: int = 1000
) -> NoiseParams:
    """Dropout (paper, section 3.2.3), noise [C, h, w] and timestep of a sample.

    The noise offset adds a random constant to each channel (tutorial_train_sdxl.py).
    """
    rng = _generator(key, "noise")
    drop_image, drop_text = dropout(
        rng.random(), image=augmentation.image_dropout, text=augmentation.text_dropout, both=augmentation.both_dropout
    )
    timestep = rng.randrange(num_train_timesteps)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise = torch.randn(latent_shape, generator=generator)
    posterior_noise = torch.randn(latent_shape, generator=generator)
    if augmentation.noise_offset:
        noise = noise + augmentation.noise_offset * torch.randn(latent_shape[0], 1, 1, generator=generator)
    return NoiseParams(drop_image, drop_text, noise, posterior_noise, timestep)


def dropout(uniform: float, *, image: float = 0.05, text: float = 0.05, both: float = 0.05) -> tuple[bool, bool]:
    """A uniform random number in [0, 1) -> (drop the image, drop the text), with the given probabilities.

    The intervals are in the original trainer's order: image, text, both, neither.
    """
    in_both = image + text <= uniform < image + text + both
    return uniform < image or in_both, image <= uniform < image + text or in_both


def _generator(key: RandomKey, purpose: str) -> random.Random:
    seed, epoch, name = key
    return random.Random(f"{seed}/{epoch}/{name}/{purpose}")
