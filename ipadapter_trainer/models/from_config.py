"""The base model, and the preprocessing for it, of a training config."""

from __future__ import annotations

import torch

from ..data.preprocess import Preprocessor
from ..errors import ConfigError
from ..settings.config import TrainConfig
from ..settings.kinds import FACE_DIM
from .base_model import BaseModel, load_base_model


def preprocessor_from_config(config: TrainConfig, base_model: BaseModel) -> Preprocessor:
    """The preprocessing for a base model, which data workers run without its weights."""
    kind = config.train_kind
    return Preprocessor(
        tokenizers=base_model.tokenizers,
        text_length=base_model.text_length,
        image_processor=base_model.image_processor if kind.takes_image else None,
        latent_scale=base_model.latent_scale,
        latent_channels=base_model.latent_channels,
        num_train_timesteps=base_model.num_train_timesteps,
        takes_face=kind.takes_face,
        face_dim=FACE_DIM,
    )


def base_model_from_config(config: TrainConfig, device: torch.device | str = "cpu") -> BaseModel:
    """The base model of a training, in its precision.

    Raises BaseModelError as `load_base_model` does; ConfigError for a resolution that is no whole number of latents.
    """
    base_model = load_base_model(
        config.base_model,
        {"no": torch.float32, "fp16": torch.float16}.get(config.mixed_precision, torch.bfloat16),
        device,
        config.image_encoder,
        base_config=config.base_config,
        prediction_type=config.prediction_type,
        needs_image_encoder=config.train_kind.takes_image,
    )
    if config.resolution % base_model.latent_scale:
        raise ConfigError(
            f"resolution = {config.resolution}: expected a multiple of {base_model.latent_scale}, the pixels per "
            f"latent of {base_model.name}."
        )
    return base_model
