"""The keys and values of an image prompt in every layer of a model, made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch

from ..ipadapter_core import KeyValue, LayerWeight, Scaling, Site, context_tokens
from ..ipadapter_core.attention import split_heads
from ..ipadapter_core.branches import branch_rows, fold_weights
from .steps import Place
from .types import ImagePrompt, LoadedAdapter, project


def layer_pairs(
    ip_adapter: LoadedAdapter,
    image_prompt: ImagePrompt,
    sites: Sequence[Site],
    weights: Sequence[LayerWeight],
    scaling: Scaling,
    dtype: torch.dtype,
    unet: torch.nn.Module,
    token_scale: float = 1.0,
) -> tuple[tuple[int, int], dict[Place, KeyValue]]:
    """The rows of both branches, and the keys and values of every layer whose weight is not 0, [rows, H, T, d], all
    weights inside, on the offload device. Computed in fp32, kept in the model's `dtype`. `token_scale` multiplies the
    tokens.
    """
    adapter, device = ip_adapter.on_device(), ip_adapter.patcher.load_device
    tokens = context_tokens(project(ip_adapter, image_prompt).to(device), adapter.spec, unet, ip_adapter.name)
    tokens = tokens * token_scale
    positives, one_each = len(image_prompt.positive), image_prompt.one_each
    shares = image_prompt.weights
    if one_each and len(tokens) == positives + 1 and len(set(shares[:positives])) > 1:
        # The single negative image serves every frame, with the weight of that frame.
        tokens = torch.cat([tokens[:positives], tokens[positives:].expand(positives, -1, -1)])
        shares = shares[:positives] * 2
    swapped = any(layer.swapped and layer.weight for layer in weights)
    rows = branch_rows(positives, len(tokens) - positives, one_each=one_each, swapped=swapped)
    home = comfy.model_management.unet_offload_device()
    pairs: dict[Place, KeyValue] = {}
    # One layer at a time: with an image for each frame of a video all layers would not fit on the device.
    for site, (to_k, to_v) in zip(sites, adapter.layers.pairs(), strict=True):
        weight = weights[site.transformer_index]
        if weight.weight == 0.0:
            continue
        pair = KeyValue(to_k(tokens), to_v(tokens))
        folded = fold_weights(pair, weight, shares, rows, scaling, positives=positives, one_each=one_each)
        if folded is not None and site.block is not None:
            parts = (part.to(home, dtype) for part in folded)
            pairs[site.block] = KeyValue(*(split_heads(part, site.heads, len(part)).contiguous() for part in parts))
    return rows, pairs


def inference_dtype(model: Any) -> torch.dtype:
    """The dtype in which the model's layers calculate."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
