"""What the emoji adapters are trained on: each image as its own prompt, most often without a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ipadapter_core import Feature

from ..models.base_model import BaseModel
from ..models.conditioning import TextStates, encode_prompts
from ..models.features import Features, encode_pixels
from ..models.image_features import encode_clip_images
from ..training.adapted_unet import TrainBatch
from .colours import colour_words
from .emoji import EmojiImages, normalize, styled_caption, to_pixels
from .views import numbered_view, other_colours

NAMED = 0.1  # share of the examples with the caption beside the image
RECOLOURED = 0.6  # share of the examples, when there are recoloured views
# What is drawn is decided in much noise: a share EARLY of the timesteps is drawn from those above EARLIEST, a share of
# the schedule; the others are uniform.
EARLY, EARLIEST = 0.6, 0.4
IMAGE_DROPOUT = BOTH_DROPOUT = 0.05  # the original's shares


View = Callable[[Tensor, torch.Generator], Tensor]  # pixels [B, 3, H, W] in [-1, 1], changed at random


@dataclass(frozen=True, eq=False)
class EmojiFeatures:
    """The frozen models' outputs for V views of N images, computed once, on the model's device.

    ``latents`` [V, N, 4, H/8, W/8], ``image_features`` [V, N, ...] and ``colours``, in words, are of the same views;
    the first ``own`` views have the images' own colours. ``text_states`` [N, 16, D], ``no_text`` [1, 16, D].
    ``timesteps`` are the scheduler's.
    """

    latents: Tensor
    text_states: Tensor
    no_text: Tensor
    image_features: Tensor
    own: int
    colours: list[list[str]]
    timesteps: int = 1000


@dataclass(frozen=True, eq=False)
class EmojiBatch(TrainBatch):
    """A training batch, and which images are drawn in it, in which views: int64 [B]."""

    rows: Tensor
    views: Tensor


def encode_emoji(
    base_model: BaseModel,
    images: EmojiImages,
    feature: Feature,
    seed: int = 0,
    own: int = 2,
    recoloured: int = 0,
    recolour: View = other_colours,
    disguise: View | None = None,
) -> EmojiFeatures:
    """Run the frozen models over all images once: ``own`` views (the image, its mirror image, shifted ones) and as
    so many more that ``recolour`` changes. ``disguise`` changes the image prompts of all views but those
    whose number is a multiple of ``own``: what an encoder sees in its training images is clearer than what it sees in
    others.
    """
    device = base_model.device
    generator = torch.Generator(device).manual_seed(seed)
    latents, features, colours = [], [], []
    for view in range(own + recoloured):
        pixels = numbered_view(to_pixels(images.images.to(device)), view, generator)
        if view >= own:
            pixels = recolour(pixels, generator)
        colours.append(colour_words(pixels))
        latents.append(torch.cat([encode_pixels(base_model, chunk) for chunk in pixels.split(64)]))
        prompts = disguise(pixels, generator) if disguise is not None and view % own else pixels
        chunks = (encode_clip_images(base_model, normalize(chunk), feature) for chunk in prompts.split(64))
        features.append(torch.cat(list(chunks)))
    return EmojiFeatures(
        latents=torch.stack(latents),
        text_states=encode_prompts(base_model, images.captions).states,
        no_text=encode_prompts(base_model, [""]).states,
        image_features=torch.stack(features),
        own=own,
        colours=colours,
        timesteps=base_model.num_train_timesteps,
    )


def caption_states(base_model: BaseModel, images: EmojiImages, features: EmojiFeatures) -> Tensor:
    """Text states [V, N, 16, D], for each view, of captions that say everything: what is drawn, in which style and
    colours.
    """
    captions = (
        [styled_caption(*each) for each in zip(images.captions, images.styles, colours, strict=True)]
        for colours in features.colours
    )
    return torch.stack([encode_prompts(base_model, texts).states for texts in captions])


def draw_batch(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> EmojiBatch:
    """One training batch; everything random comes from ``generator``, on the features' device."""
    device = features.latents.device

    def draw() -> Tensor:
        return torch.rand(batch_size, generator=generator, device=device)

    def below(high: int) -> Tensor:
        return torch.randint(high, (batch_size,), generator=generator, device=device)

    rows, views = below(features.latents.shape[1]), below(features.own)
    if (others := len(features.latents) - features.own) > 0:
        views = torch.where(draw() < RECOLOURED, features.own + below(others), views)
    dropout = draw()
    without_text = (draw() >= NAMED) | (dropout < BOTH_DROPOUT)
    timesteps, earliest = below(features.timesteps), int(EARLIEST * features.timesteps)
    timesteps = torch.where(draw() < EARLY, earliest + below(features.timesteps - earliest), timesteps)
    batch = Features(
        latents=features.latents[views, rows],
        text=TextStates(torch.where(without_text[:, None, None], features.no_text, features.text_states[rows]), None),
        image_features=(features.image_features[views, rows],),
    )
    return EmojiBatch(
        batch,
        drop_image_embeds=dropout < IMAGE_DROPOUT + BOTH_DROPOUT,
        noise=torch.randn(batch.latents.shape, generator=generator, device=device),
        timesteps=timesteps,
        rows=rows,
        views=views,
    )


def emoji_batches(features: EmojiFeatures, batch_size: int, generator: torch.Generator) -> Iterator[EmojiBatch]:
    """Endless training batches."""
    while True:
        yield draw_batch(features, batch_size, generator)
