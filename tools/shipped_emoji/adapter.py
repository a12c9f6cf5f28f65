"""Training of the bundled adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ipadapter_core import IPAdapter
from ipadapter_trainer.demo.batches import draw_batch, encode_emoji
from ipadapter_trainer.demo.emoji import EmojiImages
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.training.adapted_unet import adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter

from .loop import fit

BATCH, LEARNING_RATE = 64, 1e-3
VIEWS = 12  # of each image that the image encoder sees


def fit_adapter(
    base_model: BaseModel,
    images: EmojiImages,
    *,
    checkpoint: Path,
    steps: int,
    minutes: float,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> IPAdapter:
    """Train an adapter of the base kind, keys and values starting from the UNet's own; resumes from ``checkpoint``."""
    features = encode_emoji(base_model, images, seed, VIEWS)
    torch.manual_seed(seed)
    adapter = new_adapter(base_model)
    with adapt_unet(base_model, adapter) as denoising:

        def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            return {"loss": denoising.loss(draw_batch(features, batch_size, generator))}

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
