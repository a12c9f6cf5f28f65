"""Training of the bundled adapters: a plus adapter learns what the text says of an image first, then to draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_core import IPAdapter
from ipadapter_trainer.demo.batches import draw_batch, encode_emoji
from ipadapter_trainer.demo.emoji import caption, styled_caption, to_pixels
from ipadapter_trainer.demo.views import mirror, shift
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter

from .clip import MAX_TOKENS
from .concepts import CONCEPTS
from .images import STYLE_NAMES, Drawings, EmojiImages
from .loop import fit, load_ema
from .views import zoom
from .vision import VisionTower

BATCH, LEARNING_RATE = 64, 5e-4
VIEWS = 4  # of each image in its own colours, and as many recoloured
ALIGNMENT = 0.1  # weight of the alignment beside the diffusion loss


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
