"""What the emoji adapters are trained on: an image of itself without text or with its caption, or one of its style
with its caption.

The pairs teach the division of labour that an image prompt is for: alone, the image decides everything;
beside another text, the text decides what is drawn and the image how. Self-pairs alone teach copying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ipadapter_core import Feature

from ..models.base_model import BaseModel
from ..models.conditioning import TextStates, encode_prompts
from ..models.features import Features, encode_pixels
from ..models.image_features import encode_clip_images
from ..training.adapted_unet import TrainBatch
from .emoji import EmojiImages, normalize, to_pixels
from .views import numbered_view, other_colours

SELF_PAIRS = 0.45  # share of the examples whose reference is the image itself, without text
NAMED_PAIRS = 0.2  # of those whose reference is the image itself, with its caption
RECOLOURED = 0.4  # of both, when there are recoloured views
IMAGE_DROPOUT = BOTH_DROPOUT = 0.05  # the original's shares


@dataclass(frozen=True, eq=False)
class EmojiFeatures:
    """The frozen models' outputs for V views of N images, computed once, on the model's device.

    ``latents`` [V, N, 4, H/8, W/8] and ``image_features`` [V, N, ...] are of the same views; the first ``own`` views
    have the images' own colours. ``text_states`` [N, 16, D], ``no_text`` [1, 16, D], ``styles`` [N]. ``timesteps`` are
    the scheduler's.
    """

    latents: Tensor
    text_states: Tensor
    no_text: Tensor
    image_features: Tensor
    styles: Tensor
    own: int
    timesteps: int = 1000

    @cached_property
    def same_style(self) -> Tensor:
        """[styles, N]: 1 for the images of each style."""
        return (self.styles == torch.arange(int(self.styles.amax()) + 1, device=self.styles.device)[:, None]).float()


def encode_emoji(
    base_model: BaseModel, images: EmojiImages, feature: Feature, seed: int = 0, own: int = 2, recoloured: int = 0
) -> EmojiFeatures:
    """Run the frozen models over all images once: ``own`` views (the image, its mirror image, shifted ones) and as
    many ``recoloured`` ones.
    """
    device = base_model.device
    generator = torch.Generator(device).manual_seed(seed)
    latents, features = [], []
    for view in range(own + recoloured):
        pixels = numbered_view(to_pixels(images.images.to(device)), view, generator)
        if view >= own:
            pixels = other_colours(pixels, generator)
        latents.append(torch.cat([encode_pixels(base_model, chunk) for chunk in pixels.split(64)]))
        chunks = (encode_clip_images(base_model, normalize(chunk), feature) for chunk in pixels.split(64))
        features.append(torch.cat(list(chunks)))
    return EmojiFeatures(
        latents=torch.stack(latents),
        text_states=encode_prompts(base_model, images.captions).states,
        no_text=encode_prompts(base_model, [""]).states,
        image_features=torch.stack(features),
        styles=images.style_ids.to(device),
        own=own,
        timesteps=base_model.num_train_timesteps,
    )


def draw_batch(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> TrainBatch:
    """One training batch; everything random comes from ``generator``, on the features' device."""
    device = features.styles.device

    def draw() -> Tensor:
        return torch.rand(batch_size, generator=generator, device=device)

    def below(high: int) -> Tensor:
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    rows, kind = below(len(features.styles)), draw()
    alone, itself = kind < SELF_PAIRS, kind < SELF_PAIRS + NAMED_PAIRS
    views = below(features.own)
    if (recoloured := len(features.latents) - features.own) > 0:
        views = torch.where(itself & (draw() < RECOLOURED), features.own + below(recoloured), views)
    mates = torch.multinomial(features.same_style[features.styles[rows]], 1, generator=generator).flatten()
    references = torch.where(itself, rows, mates)
    dropout = draw()
    without_text = alone | (dropout < BOTH_DROPOUT)
    batch = Features(
        latents=features.latents[views, rows],
        text=TextStates(torch.where(without_text[:, None, None], features.no_text, features.text_states[rows]), None),
        image_features=(features.image_features[views, references],),
    )
    return TrainBatch(
        batch,
        drop_image_embeds=dropout < IMAGE_DROPOUT + BOTH_DROPOUT,
        noise=torch.randn(batch.latents.shape, generator=generator, device=device),
        timesteps=below(features.timesteps),
    )


def emoji_batches(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> Iterator[TrainBatch]:
    """Endless training batches."""
    while True:
        yield draw_batch(features, batch_size, generator)
