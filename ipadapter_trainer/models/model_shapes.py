"""What a base model's configs say: sizes, numbers and modules without weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ipadapter_core import Site, diffusers_sites, family_of

from ..errors import BaseModelError
from .image_encoder import ImageEncoder
from .image_processor import CLIPImageProcessor
from .model_folder import TIME_IDS


class ModelParts(Protocol):
    """Where a base model comes from: `ModelFolder` or `SingleFile`."""

    name: str
    is_sdxl: bool
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    text_configs: tuple[CLIPTextConfig, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler: DDPMScheduler

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel: ...
    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL: ...
    def load_text_encoders(self, dtype: torch.dtype) -> tuple[Any, ...]: ...
    def fingerprint(self, part: str) -> str: ...


class ModelShapes:
    """The part of `BaseModel` that needs no weights."""

    def __init__(self, parts: ModelParts, encoder: ImageEncoder | None, dtype: torch.dtype) -> None:
        self._parts = parts
        self._encoder = encoder
        self.dtype = dtype  # of the UNet, the text encoders and the image encoder
        self.name = parts.name
        self.is_sdxl = parts.is_sdxl  # two text encoders, pooled text and time ids
        self.tokenizers = parts.tokenizers
        self.scheduler = parts.scheduler

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first tokenizer."""
        return self.tokenizers[0]

    @property
    def image_processor(self) -> CLIPImageProcessor:
        """The image encoder's preprocessing. Raises BaseModelError when there is no image encoder."""
        return self._image_encoder.processor

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return str(self.scheduler.config["prediction_type"])

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the noise schedule (1000)."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, padding included (77 for all published models)."""
        lengths = [int(t.model_max_length) for t in self.tokenizers]
        return min(*lengths, *(int(c.max_position_embeddings) for c in self._parts.text_configs))

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype of the VAE: float32 for SDXL's, and for any in float16, unless its config says that it is a fixed
        one.
        """
        overflows = self.is_sdxl or self.dtype == torch.float16
        return torch.float32 if overflows and self._parts.vae_config["force_upcast"] else self.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (4)."""
        return int(self._parts.vae_config["latent_channels"])

    @property
    def latent_scale(self) -> int:
        """Pixels per latent (8)."""
        return 2 ** (len(self._parts.vae_config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied with (0.18215; 0.13025 for SDXL)."""
        return float(self._parts.vae_config["scaling_factor"])

    @property
    def sample_size(self) -> int:
        """The side of the images that the UNet was made for, in pixels."""
        return int(self._parts.unet_config["sample_size"]) * self.latent_scale

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The UNet's cross-attention layers in id order."""
        return diffusers_sites(self.meta_unet())

    @property
    def family(self) -> str:
        """ "sd15", "sd2" or "sdxl" for UNets of their shapes, else "context-<width>"."""
        return family_of(self.sites[0].cross_attention_dim, [site.dim for site in self.sites])

    @property
    def has_image_encoder(self) -> bool:
        """Whether there is an image encoder."""
        return self._encoder is not None

    @property
    def image_dim(self) -> int:
        """Channels of `image_embeds`."""
        return int(self._image_encoder.config.projection_dim)

    @property
    def hidden_dim(self) -> int:
        """Channels of the image encoder's hidden states."""
        return int(self._image_encoder.config.hidden_size)

    @property
    def image_tokens(self) -> int:
        """The image encoder's hidden states of an image: its patches and the class token (257 for ViT-H/14)."""
        return self._image_encoder.num_tokens

    @property
    def encoder_name(self) -> str:
        """The image encoder as people know it, or its sizes (`encoder_fingerprint` tells them apart)."""
        return self._image_encoder.name

    def meta_unet(self) -> UNet2DConditionModel:
        """A new UNet on the meta device. The other `meta_*` likewise."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(self._parts.unet_config)

    def meta_vae(self) -> AutoencoderKL:
        """The VAE without weights."""
        with torch.device("meta"):
            return AutoencoderKL.from_config(self._parts.vae_config)

    def meta_text_encoders(self) -> nn.ModuleList:
        """The text encoders without weights."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        with torch.device("meta"):
            return nn.ModuleList(kind(c) for kind, c in zip(kinds, self._parts.text_configs, strict=False))

    def meta_image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder without weights. Raises BaseModelError when there is none."""
        with torch.device("meta"):
            return CLIPVisionModelWithProjection(self._image_encoder.config)

    def meta_conditions(self, batch_size: int) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` for B rows on the meta device; None for models without."""
        if not self.is_sdxl:
            return None
        width = int(self._parts.text_configs[-1].projection_dim)
        shapes = {"text_embeds": (batch_size, width), "time_ids": (batch_size, TIME_IDS)}
        return {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}

    @property
    def _image_encoder(self) -> ImageEncoder:
        if self._encoder is None:
            raise BaseModelError(
                f"{self.name}: no image encoder was given. Set image_encoder to the folder of a "
                "CLIPVisionModelWithProjection, or its .safetensors file."
            )
        return self._encoder
