"""What the emoji adapters are trained on: an image of itself without text or with its caption, or one of its style
with its caption.

The pairs teach the division of labour that an image prompt is for: alone, the image decides everything;
beside another text, the text decides what is drawn and the image how. Self-pairs alone teach copying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_core import Feature, IPAdapter
from ipadapter_trainer.demo.emoji import normalize, styled_caption, to_pixels
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.conditioning import TextStates, encode_prompts
from ipadapter_trainer.models.features import Features, encode_pixels
from ipadapter_trainer.models.image_features import encode_clip_images
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import TrainBatch, adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter

from .build import GRID, caption
from .clip import MAX_TOKENS
from .concepts import CONCEPTS
from .images import STYLE_NAMES, Drawings, EmojiImages
from .loop import fit, load_ema
from .views import PERMUTATIONS, mirror, recolour, shift, zoom
from .vision import VisionTower

BATCH, LEARNING_RATE = 64, 5e-4
SELF_PAIRS = 0.45  # share of the examples whose reference is the image itself, without text
NAMED_PAIRS = 0.2  # of those whose reference is the image itself, with its caption
RECOLOURED = 0.4  # of both, when there are recoloured views
VIEWS = 4  # of each image in its own colours, and as many recoloured
ALIGNMENT = 0.1  # weight of the alignment beside the diffusion loss
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
        return (self.styles == torch.arange(len(STYLE_NAMES), device=self.styles.device)[:, None]).float()


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
        pixels = to_pixels(images.images.to(device))
        if view < 2:
            pixels = pixels.flip(-1) if view else pixels
        else:
            pixels = shift(mirror(pixels, generator), generator, images.size // GRID)
        if view >= own:
            drawn = torch.randint(1, len(PERMUTATIONS), (len(pixels),), generator=generator, device=device)
            pixels = recolour(pixels, drawn)
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


@dataclass(frozen=True, eq=False)
class Alignment:
    """Hidden states [N, 1 + patches, D] of drawings of the known concepts, and the text states [N, 16, E] of what the
    image encoder sees in them: those of all captions in all styles, by their probability.
    """

    hidden_states: Tensor
    text_states: Tensor

    def loss(self, adapter: IPAdapter, batch_size: int, generator: torch.Generator) -> Tensor:
        """How far the image tokens of a plus adapter are from those text states."""
        device = generator.device
        rows = torch.randint(len(self.hidden_states), (batch_size,), generator=generator, device=device)
        tokens = adapter.encode(self.hidden_states[rows].float())
        return F.mse_loss(tokens.float(), self.text_states[rows].float())


@torch.no_grad()
def align_drawings(base_model: BaseModel, tower: VisionTower, drawings: Drawings, seed: int = 0) -> Alignment:
    """See all drawings of the known concepts twice: as they are, and mirrored, shifted and zoomed.

    An adapter without it finds out very slowly what an image shows: the diffusion loss says little about it. The
    captions' states, which the UNet knows, are a start from which keys and values copied from the text's already draw.
    """
    device, known = base_model.device, len(CONCEPTS)
    captions = [styled_caption(caption(concept), style) for concept in CONCEPTS for style in STYLE_NAMES]
    of_captions = encode_prompts(base_model, captions).states.flatten(1)
    images = drawings.images[drawings.concept_ids < known].to(device)
    generator = torch.Generator(device).manual_seed(seed)
    tower.to(device).eval()
    seen: list[Tensor] = []
    expected: list[Tensor] = []
    for view in range(2):
        for chunk in images.split(64):
            pixels = to_pixels(chunk)
            if view:
                pixels = zoom(shift(mirror(pixels, generator), generator), generator, smallest=0.9)
            states, _ = tower.states(pixels)
            concept, style = tower.answers(states)
            joint = concept[:, :known].softmax(-1)[:, :, None] * style.exp()[:, None]
            seen.append(states.half())
            expected.append((joint.flatten(1) @ of_captions.float()).half())
    return Alignment(torch.cat(seen), torch.cat(expected).unflatten(1, (MAX_TOKENS, -1)))


def align_projector(
    base_model: BaseModel, alignment: Alignment, *, checkpoint: Path, steps: int, minutes: float, seed: int = 0
) -> IPAdapter:
    """A new plus adapter whose projector has learned the text states of what an image shows."""
    torch.manual_seed(seed)
    adapter = new_adapter(base_model, TRAIN_KINDS["plus"])

    def losses(_: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": alignment.loss(adapter, BATCH, generator)}

    fit(adapter.projector, losses, checkpoint=checkpoint, steps=steps, minutes=minutes, learning_rate=LEARNING_RATE)
    return adapter


def fit_adapter(
    base_model: BaseModel,
    images: EmojiImages,
    kind: str,
    *,
    checkpoint: Path,
    steps: int,
    minutes: float,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    views: int = VIEWS,
    aligned: Path | None = None,
    alignment: Alignment | None = None,
) -> IPAdapter:
    """Train an adapter, keys and values starting from the UNet's own; resumes from ``checkpoint``.

    ``aligned`` is the checkpoint of ``align_projector`` to start from; ``alignment`` keeps the projector there, while
    the diffusion loss adds what captions do not say.
    """
    torch.manual_seed(seed)
    adapter = new_adapter(base_model, TRAIN_KINDS[kind])
    if aligned is not None:
        load_ema(adapter.projector, aligned)
        adapter.train()
    features = encode_emoji(base_model, images, adapter.spec.feature, seed, views, views)
    with adapt_unet(base_model, adapter) as denoising:

        def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            denoised = denoising.loss(draw_batch(features, batch_size, generator))
            if alignment is None:
                return {"loss": denoised}
            kept = alignment.loss(adapter, batch_size, generator)
            return {"loss": denoised + ALIGNMENT * kept, "denoised": denoised.detach(), "aligned": kept.detach()}

        fit(
            adapter,
            losses,
            checkpoint=checkpoint,
            steps=steps,
            minutes=minutes,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
    return adapter
