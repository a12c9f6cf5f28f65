"""The published file format: every key and shape of an adapter, and what hosts hard-code about them."""

from __future__ import annotations

import torch

from ipadapter_core import FAMILIES, FAMILY_NAMES, AdapterSpec, IPAdapter, export_state, new_spec


def published_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Every flat key of an adapter's file and its shape: `image_proj.*`, then `ip_adapter.*`."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in export_state(IPAdapter(spec)).items()}


def published_differences(spec: AdapterSpec) -> tuple[str, ...]:
    """What is unlike every published adapter of this kind, as clauses for people; hosts hard-code these numbers
    (ComfyUI_IPAdapter_plus the tokens, the depth and the heads, diffusers the depth and the width of a head).
    """
    if spec.family not in FAMILIES:
        models = ", ".join(FAMILY_NAMES.values())
        return (f"made for a UNet of its own ({spec.family_name}, {len(spec.layer_dims)} layers), not for {models}",)
    published = new_spec(spec.kind, spec.layer_dims, spec.cross_attention_dim)
    named = {"num_tokens": "tokens", "depth": "resampler layers", "heads": "heads", "dim_head": "channels per head"}
    named |= {"resampler_dim": "channels in the resampler", "lora_rank": "ranks of LoRA"}
    if spec.unnormalised:  # the published one has no counterpart in new_spec
        named = {"num_tokens": "tokens"}
    return tuple(
        f"{getattr(spec, field)} {what} where the published files have {getattr(published, field)}"
        for field, what in named.items()
        if getattr(spec, field) != getattr(published, field)
    )
