"""Options of the frozen UNet that save memory or time."""

from __future__ import annotations

from typing import Any

import torch

from .base_model import BaseModel
from .float8 import store_in_float8
from .frozen import recompute_activations, release_conv_inputs


def prepare_unet(
    base_model: BaseModel, *, fp8: bool, gradient_checkpointing: bool, compiled: bool, backend: str = "inductor"
) -> None:
    """Store the UNet's weights in float8 (`fp8`), recompute its activations in the backward pass, or compile it.

    Make the adapter first: its keys and values start as the UNet's weights, which float8 rounds.
    """
    unet: Any = base_model.unet  # torch's types of `to` lack memory_format alone
    if base_model.device.type == "cuda" and base_model.dtype != torch.float32:
        # The layout of cuDNN's half-precision kernels; otherwise every convolution transposes its weights.
        unet.to(memory_format=torch.channels_last)
    if fp8:
        store_in_float8(unet)
    elif not compiled:  # a compiler decides by itself what to save
        release_conv_inputs(unet)
    if base_model.device.type == "cuda" and not compiled and not gradient_checkpointing:
        recompute_activations(unet)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if compiled:
        unet.compile(backend=backend)
