"""Trades of the frozen UNet's memory, time and precision."""

from __future__ import annotations

import torch

from .base_model import BaseModel
from .float8 import store_in_float8
from .frozen import release_conv_inputs


def tune_unet(
    base_model: BaseModel, *, fp8: bool, gradient_checkpointing: bool, compiled: bool, backend: str = "inductor"
) -> None:
    """Store the UNet's weights in 8 bit and compute in the base's dtype, compute activations again in the backward
    pass, or run it through torch.compile with a `backend` of it. Make the adapter first: its keys and values start as
    the UNet's own, unrounded.
    """
    if base_model.device.type == "cuda" and base_model.dtype != torch.float32:
        # As cuDNN's kernels for half precision read it: else every convolution turns its weights around.
        base_model.unet.to(memory_format=torch.channels_last)
    if fp8:
        store_in_float8(base_model.unet)
    elif not compiled:  # a compiler decides by itself what to keep
        release_conv_inputs(base_model.unet)
    if gradient_checkpointing:
        base_model.unet.enable_gradient_checkpointing()
    if compiled:
        base_model.unet.compile(backend=backend)
