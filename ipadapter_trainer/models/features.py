"""Latents, text states and image features of a batch: all that a training step takes from the frozen models.

A cache can therefore replace them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ipadapter_core import AdapterSpec

from ..data.dataset import Batch
from .base_model import BaseModel
from .conditioning import TextStates, encode_tokens, time_ids
from .image_features import encode_clip_images


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs of the frozen models for B examples."""

    latents: Tensor  # [B, 4, h, w], times the VAE's scaling factor
    text: TextStates
    image_features: tuple[Tensor, ...]  # what `IPAdapter.encode` takes
    time_ids: Tensor | None = None  # [B, 6], for SDXL

    def __len__(self) -> int:
        return len(self.latents)

    def index(self, rows: Tensor) -> Features:
        """The features of some rows (indices or a mask)."""
        return Features(
            self.latents[rows],
            self.text.index(rows),
            tuple(feature[rows] for feature in self.image_features),
            None if self.time_ids is None else self.time_ids[rows],
        )

    def to(self, device: torch.device | str) -> Features:
        """The same on another device."""
        return Features(
            self.latents.to(device),
            self.text.to(device),
            tuple(feature.to(device) for feature in self.image_features),
            None if self.time_ids is None else self.time_ids.to(device),
        )

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Several batches as one."""
        ids = [part.time_ids for part in parts if part.time_ids is not None]
        return Features(
            torch.cat([part.latents for part in parts]),
            TextStates.cat([part.text for part in parts]),
            tuple(torch.cat(rows) for rows in zip(*(part.image_features for part in parts), strict=True)),
            torch.cat(ids) if ids else None,
        )


@torch.no_grad()
def encode_batch(base_model: BaseModel, batch: Mapping[str, Any] | Batch, spec: AdapterSpec) -> Features:
    """Run the frozen models, on their device, for what the batch does not hold already.

    `spec` is the adapter's and decides which image features are computed.
    """
    tensors = cast("Mapping[str, Tensor]", batch)  # which keys there are depends on the kind and the cache
    return Features(
        latents=_latents(base_model, tensors),
        text=_text(base_model, tensors),
        image_features=_image_features(base_model, tensors, spec),
        time_ids=_time_ids(base_model, tensors) if base_model.is_sdxl else None,
    )


@torch.no_grad()
def encode_pixels(base_model: BaseModel, images: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, 4, H/8, W/8], times the scaling factor, in float32.

    Sampled from the VAE's posterior with `posterior_noise`; without it, its mean.
    """
    return sample_posterior(base_model, *encode_moments(base_model, images), posterior_noise)


@torch.no_grad()
def encode_moments(base_model: BaseModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] in [-1, 1] -> mean and standard deviation [B, 4, H/8, W/8] of the VAE's posterior."""
    vae: Any = base_model.vae  # diffusers types its output as a tuple
    posterior = vae.encode(base_model.to_device(images, vae.dtype)).latent_dist
    # Contiguous, as from a cache; else the UNet would run in the VAE's memory format.
    return posterior.mean.float().contiguous(), posterior.std.float().contiguous()


def sample_posterior(base_model: BaseModel, mean: Tensor, std: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
    """A sample of the VAE's posterior, or its mean without noise, times the scaling factor."""
    latents = mean if posterior_noise is None else mean + std * base_model.to_device(posterior_noise)
    return latents * base_model.scaling_factor


def _latents(base_model: BaseModel, batch: Mapping[str, Tensor]) -> Tensor:
    if "latents_mean" in batch:
        mean, std = (base_model.to_device(batch[key], torch.float32) for key in ("latents_mean", "latents_std"))
        return sample_posterior(base_model, mean, std, batch["posterior_noise"])
    return encode_pixels(base_model, batch["images"], batch["posterior_noise"])


def _text(base_model: BaseModel, batch: Mapping[str, Tensor]) -> TextStates:
    if "text_states" in batch:
        pooled = base_model.to_device(batch["text_embeds"], base_model.dtype) if "text_embeds" in batch else None
        return TextStates(base_model.to_device(batch["text_states"], base_model.dtype), pooled)
    return encode_tokens(base_model, batch["text_input_ids"], batch.get("text_input_ids_2"))


def _image_features(base_model: BaseModel, batch: Mapping[str, Tensor], spec: AdapterSpec) -> tuple[Tensor, ...]:
    features: tuple[Tensor, ...] = ()
    if spec.face_dim is not None:
        features = (base_model.to_device(batch["face_id_embed"]),)
    if spec.image_dim is None:
        return features
    if "image_features" in batch:
        return (*features, base_model.to_device(batch["image_features"], base_model.dtype))
    return (*features, encode_clip_images(base_model, batch["clip_images"], spec.feature))


def _time_ids(base_model: BaseModel, batch: Mapping[str, Tensor]) -> Tensor:
    sizes = (batch["original_size"], batch["crop_coords_top_left"], batch["target_size"])
    return time_ids(*(base_model.to_device(size) for size in sizes))
