"""Image features and face embeddings, in the form that each kind of adapter takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ipadapter_core import AdapterSpec, Feature

from ..data.images import to_rgb
from ..errors import DataError
from .base_model import BaseModel


@torch.no_grad()
def encode_clip_images(base_model: BaseModel, clip_images: Tensor, feature: Feature = "image_embeds") -> Tensor:
    """Normalised pixels [B, 3, S, S] -> image_embeds [B, E], or penultimate hidden states [B, L, E] for the other
    features.
    """
    pixels = base_model.to_device(clip_images, base_model.dtype)
    if feature == "image_embeds":
        return base_model.image_encoder(pixels).image_embeds
    return base_model.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]


def encode_images(
    base_model: BaseModel,
    spec: AdapterSpec,
    images: Sequence[Image.Image],
    face_embeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Images of any size and mode, and face embeddings [B, F], -> what `IPAdapter.encode` takes.

    Raises DataError when the adapter needs face embeddings and none are given, and the other way around.
    """
    takes_face = spec.face_dim is not None
    if takes_face != (face_embeds is not None):
        need = "needs face embeddings: give them" if takes_face else "takes no face embedding: leave it out"
        raise DataError(f"A {spec.kind} adapter {need}.")
    faces = () if face_embeds is None else (face_embeds.to(base_model.device).float(),)
    if spec.image_dim is None:
        return faces
    rgb = [to_rgb(image) for image in images]
    pixels = base_model.image_processor(images=rgb, return_tensors="pt").pixel_values
    return (*faces, encode_clip_images(base_model, pixels, spec.feature))


@torch.no_grad()
def dropped_features(base_model: BaseModel, spec: AdapterSpec) -> tuple[Tensor, ...]:
    """The features of a dropped image in training and of the negative image at inference, each [1, ...].

    Zeros for embeddings of images and faces (tutorial_train.py, tutorial_train_faceid.py); the encoding of a
    grey image, whose pixel_values are zeros, where hidden states are read (tutorial_train_plus.py).
    """
    features: tuple[Tensor, ...] = ()
    if spec.face_dim is not None:
        features = (torch.zeros(1, spec.face_dim, device=base_model.device),)
    if spec.image_dim is None:
        return features
    if spec.feature == "image_embeds":
        return (*features, torch.zeros(1, spec.image_dim, device=base_model.device))
    config: Any = base_model.image_encoder.config
    side = config.image_size
    return (*features, encode_clip_images(base_model, torch.zeros(1, 3, side, side), spec.feature))
