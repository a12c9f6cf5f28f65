"""Training batches of the emoji adapter: an image with itself as prompt and no text, or with one of its style and its
caption.

The pairs teach the division of labour that an image prompt is for: alone, the image decides everything; beside
a text, the text decides what is drawn and the image how. Self-pairs alone teach copying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..models.base_model import BaseModel
from ..models.conditioning import TextStates, encode_prompts
from ..models.features import Features, encode_pixels
from ..models.image_features import encode_clip_images
from ..training.adapted_unet import TrainBatch
from .emoji import STYLE_NAMES, EmojiImages, augment, normalize, pick, to_pixels, zoom

SELF_PAIRS = 0.5  # share of the examples whose reference is the image itself, without text
IMAGE_DROPOUT = BOTH_DROPOUT = 0.05  # the original's shares


@dataclass(frozen=True, eq=False)
class EmojiFeatures:
    """The frozen models' outputs for N images and their mirror images, computed once.

    ``latents`` [2, N, 4, 8, 8], ``text_states`` [N, 16, D], ``no_text`` [1, 16, D], ``image_embeds`` [V, N, E]:
    V views of each image, differently shifted and scaled, so that the adapter learns more than N points.
    ``styles`` [N]. ``timesteps`` are the scheduler's.
    """

    latents: Tensor
    text_states: Tensor
    no_text: Tensor
    image_embeds: Tensor
    styles: Tensor
    timesteps: int = 1000

    @cached_property
    def rows_of_style(self) -> tuple[Tensor, ...]:
        """The images of each style."""
        return tuple((self.styles == style).nonzero().flatten() for style in range(len(STYLE_NAMES)))


def encode_emoji(base_model: BaseModel, images: EmojiImages, seed: int = 0, views: int = 4) -> EmojiFeatures:
    """Run the frozen models over all images once."""
    generator = torch.Generator().manual_seed(seed)
    mirrored = images.images.flip(-1)
    latents = [_chunked(encode_pixels, base_model, to_pixels(part)) for part in (images.images, mirrored)]
    pixels = to_pixels(images.images)
    seen = [pixels] + [zoom(augment(pixels, generator), generator) for _ in range(views - 1)]
    return EmojiFeatures(
        latents=torch.stack(latents),
        text_states=encode_prompts(base_model, images.captions).states.cpu(),
        no_text=encode_prompts(base_model, [""]).states.cpu(),
        image_embeds=torch.stack([_chunked(encode_clip_images, base_model, normalize(view)) for view in seen]),
        styles=images.style_ids,
        timesteps=base_model.num_train_timesteps,
    )


def draw_batch(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> TrainBatch:
    """One training batch; everything random comes from ``generator``."""
    rows = torch.randint(len(features.styles), (batch_size,), generator=generator)
    alone = torch.rand(batch_size, generator=generator) < SELF_PAIRS
    of_style = [features.rows_of_style[style] for style in features.styles[rows].tolist()]
    others = torch.stack([pick(rows, generator) for rows in of_style])
    view = torch.randint(len(features.image_embeds), (batch_size,), generator=generator)
    mirrored = torch.randint(2, (batch_size,), generator=generator)
    draw = torch.rand(batch_size, generator=generator)
    without_text = alone | (draw < BOTH_DROPOUT)
    states = torch.where(without_text[:, None, None], features.no_text, features.text_states[rows])
    batch = Features(
        latents=features.latents[mirrored, rows],
        text=TextStates(states, None),
        image_features=(features.image_embeds[view, torch.where(alone, rows, others)],),
    )
    return TrainBatch(
        batch,
        drop_image_embeds=draw < IMAGE_DROPOUT + BOTH_DROPOUT,
        noise=torch.randn(batch.latents.shape, generator=generator),
        timesteps=torch.randint(features.timesteps, (batch_size,), generator=generator),
    )


def emoji_batches(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> Iterator[TrainBatch]:
    """Endless training batches."""
    while True:
        yield draw_batch(features, batch_size, generator)


def _chunked(encode: Callable[[BaseModel, Tensor], Tensor], base_model: BaseModel, rows: Tensor) -> Tensor:
    return torch.cat([encode(base_model, chunk).cpu() for chunk in rows.split(64)])
