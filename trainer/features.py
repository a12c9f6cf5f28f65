"""What the frozen models say about a batch. A training step needs nothing else, so a cache can stand in for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .base_model import BaseModel
from .data import Batch, to_rgb


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs of the frozen models for B examples."""

    latents: Tensor  # [B, 4, h, w], times the VAE's scaling factor
    text_states: Tensor  # [B, L, D]
    image_embeds: Tensor  # [B, E]

    def __len__(self) -> int:
        return len(self.latents)

    def index(self, rows: Tensor) -> Features:
        """The features of some rows (indices or a mask)."""
        return Features(self.latents[rows], self.text_states[rows], self.image_embeds[rows])

    def to(self, device: torch.device | str) -> Features:
        """The same on another device."""
        return Features(self.latents.to(device), self.text_states.to(device), self.image_embeds.to(device))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Several batches as one."""
        return Features(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.text_states for part in parts]),
            torch.cat([part.image_embeds for part in parts]),
        )


@torch.no_grad()
def encode_batch(base_model: BaseModel, batch: Batch, generator: torch.Generator | None = None) -> Features:
    """Run the frozen models over a batch, on the base model's device.

    The latents are drawn from the VAE's posterior with `generator` (on the CPU), or are its means without
    one.
    """
    return Features(
        encode_pixels(base_model, batch["images"], generator),
        encode_tokens(base_model, batch["text_input_ids"]),
        encode_clip_images(base_model, batch["clip_images"]),
    )


@torch.no_grad()
def encode_pixels(base_model: BaseModel, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, 4, H/8, W/8], times the scaling factor, in float32."""
    vae = base_model.vae
    posterior = vae.encode(images.to(vae.device, torch.float32, non_blocking=True)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents * vae.config["scaling_factor"]


@torch.no_grad()
def encode_tokens(base_model: BaseModel, text_input_ids: Tensor) -> Tensor:
    """Token ids [B, L] -> the text encoder's last hidden states [B, L, D]."""
    return base_model.text_encoder(text_input_ids.to(base_model.device, non_blocking=True)).last_hidden_state


@torch.no_grad()
def encode_prompts(base_model: BaseModel, prompts: Sequence[str]) -> Tensor:
    """Prompts -> text states [B, L, D]; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    ids = base_model.tokenizer(
        distinct,
        padding="max_length",
        truncation=True,
        max_length=base_model.text_length,
        return_tensors="pt",
    ).input_ids
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=base_model.device)
    return encode_tokens(base_model, ids)[rows]


@torch.no_grad()
def encode_clip_images(base_model: BaseModel, clip_images: Tensor) -> Tensor:
    """Normalised pixels [B, 3, S, S] -> image_embeds [B, E]."""
    pixels = clip_images.to(base_model.device, base_model.dtype, non_blocking=True)
    return base_model.image_encoder(pixels).image_embeds


def encode_pictures(base_model: BaseModel, pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size and mode -> image_embeds [B, E]."""
    rgb = [to_rgb(picture) for picture in pictures]
    return encode_clip_images(base_model, base_model.image_processor(images=rgb, return_tensors="pt").pixel_values)
