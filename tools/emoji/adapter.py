"""Training of the bundled adapters: a plus adapter learns what the text says of an image first, then to draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_core import IPAdapter
from ipadapter_trainer.demo.alignment import Alignment, cancel_empty_text
from ipadapter_trainer.demo.batches import caption_states, draw_batch, encode_emoji
from ipadapter_trainer.demo.colours import colour_words
from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, caption, styled_caption, to_pixels
from ipadapter_trainer.demo.views import mirror, other_colours
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.conditioning import TextStates, encode_prompts
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import AdaptedUNet, TrainBatch, adapt_unet
from ipadapter_trainer.training.new_adapter import adapter_spec, new_adapter
from ipadapter_trainer.training.objective import noisy_latents_and_target

from .concepts import CONCEPTS
from .images import Drawings
from .loop import fit, load_ema
from .views import blend, other_tones, patchwork, warp, zoom
from .vision import VisionTower

BATCH, LEARNING_RATE = 32, 1e-3
ALIGN_BATCH, ALIGN_RATE = 64, 2e-3
VIEWS = 3  # of each image in its own colours, and three times as many in others
TAUGHT = 0.75  # share of the UNet's own prediction in the target
COARSE = 4  # latents a side of a cell, whose mean holds the colours
COLOURS = 8.0  # weight of the error of the cells' means beside the loss


@torch.no_grad()
def align_drawings(base_model: BaseModel, tower: VisionTower, drawings: Drawings, seed: int = 0) -> Alignment:
    """What the image encoder sees in drawings, and the text states of a caption that says the same: the concept and
    the style that its heads find, and the colours.

    It is sure of its training images, and not of those it has never seen. So there are other views of them, two
    drawings in one image, and concepts that the captions do not know.
    """
    device, known = base_model.device, len(CONCEPTS)
    generator = torch.Generator(device).manual_seed(seed)
    own = drawings.concept_ids < known
    order = torch.randperm(int(own.sum()), generator=torch.Generator().manual_seed(seed))
    tower.to(device).eval()
    seen: list[Tensor] = []
    captions: list[str] = []

    def look(pixels: Tensor) -> None:
        states, _ = tower.states(pixels)
        concepts, styles = (found.argmax(dim=1).tolist() for found in tower.known_answers(states))
        seen.append(states.half())
        for concept, style, colours in zip(concepts, styles, colour_words(pixels), strict=True):
            captions.append(styled_caption(caption(CONCEPTS[concept]), STYLE_NAMES[style], colours))

    for chunk in drawings.images[own][order].split(64):
        for view in _views(to_pixels(chunk.to(device)), generator):
            look(view)
    others = drawings.images[~own]
    for start in range(0, len(others), 64):
        pixels = mirror(to_pixels(others[start : start + 64].to(device)), generator)
        look(warp(pixels, generator) if start % 128 else pixels)
    alignment = Alignment(torch.cat(seen), encode_prompts(base_model, captions).states.half())
    no_text = encode_prompts(base_model, [""]).states
    return alignment.with_no_image(base_model, adapter_spec(base_model, TRAIN_KINDS["plus"]), no_text)


def _views(pixels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Images as they are; zoomed; warped four times, then recoloured twice; blended with another; half of another."""
    yield pixels
    yield zoom(mirror(pixels, generator), generator)
    warped = pixels
    for number in range(4):
        warped = warp(mirror(pixels, generator), generator)
        yield other_colours(warped, generator) if number % 2 else warped
    others = warped.roll(1, 0)
    yield blend(warped, others, generator)
    yield patchwork(warped, others, generator)


def align_projector(
    base_model: BaseModel,
    alignment: Alignment,
    projector: nn.Module,
    *,
    checkpoint: Path,
    steps: int,
    minutes: float,
    seed: int = 0,
) -> IPAdapter:
    """A new plus adapter whose projector has learned all text states of what an image shows, ``projector`` first."""
    torch.manual_seed(seed)
    adapter = new_adapter(base_model, TRAIN_KINDS["plus"])
    adapter.projector.load_state_dict(projector.state_dict())

    def losses(_: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        return {"loss": alignment.loss(adapter, ALIGN_BATCH, generator)}

    fit(adapter.projector, losses, checkpoint=checkpoint, steps=steps, minutes=minutes, learning_rate=ALIGN_RATE)
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
) -> IPAdapter:
    """Train an adapter, keys and values starting from the UNet's own; resumes from ``checkpoint``.

    The UNet without the adapter is the teacher beside the images: with the adapter it learns to predict what it
    predicts alone from a caption that says everything. ``aligned`` is the checkpoint of ``align_projector`` that a new
    adapter starts from. Nothing holds the projector there: a caption names three colours, the image has them all.
    """
    torch.manual_seed(seed)
    adapter = new_adapter(base_model, TRAIN_KINDS[kind])
    features = encode_emoji(
        base_model, images, adapter.spec.feature, seed, views, 3 * views, recolour=other_tones, disguise=warp
    )
    captions = caption_states(base_model, images, features)
    if aligned is not None and not checkpoint.is_file():
        load_ema(adapter.projector, aligned)
        generator = torch.Generator(base_model.device).manual_seed(seed)
        cancel_empty_text(base_model, adapter, features.latents[0], captions[0], features.no_text, generator)
    with adapt_unet(base_model, adapter) as denoising:

        def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            batch = draw_batch(features, batch_size, generator)
            return {"loss": taught_loss(denoising, batch, TextStates(captions[batch.views, batch.rows], None))}

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


def taught_loss(denoising: AdaptedUNet, batch: TrainBatch, captions: TextStates) -> Tensor:
    """The diffusion loss, in whose target the details are in part what the UNet itself predicts from the whole
    ``captions`` [B].

    That says what an image shows with less noise than one image does (distillation, arXiv 1503.02531). Of the image's
    colours it knows but three names; so that they are learned as fast, the coarse error counts more.
    """
    objective, features = denoising.objective, batch.features
    noisy, target = noisy_latents_and_target(objective.scheduler, features.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        denoising.disable_adapter()
        taught = denoising.predict(noisy, batch.timesteps, captions)
        details = taught.float() - target.float()
        details -= F.interpolate(F.avg_pool2d(details, COARSE), scale_factor=COARSE, mode="bilinear")
        target = target + TAUGHT * details * (1 - batch.drop_image_embeds.float())[:, None, None, None]
    denoising.enable_adapter(features.image_features, batch.drop_image_embeds)
    predicted = denoising.predict(noisy, batch.timesteps, features.text)
    coarse = F.avg_pool2d(predicted.float() - target, COARSE).square().mean()
    return objective.sample_losses(predicted, target, batch.timesteps).mean() + COLOURS * coarse
