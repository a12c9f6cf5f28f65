"""Refuse a wrong pairing of adapter and model before sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .layers import Site
from .spec import FAMILY_NAMES, KOLORS_TEXT_DIM, AdapterSpec, family_of

_KOLORS_LABEL_DIM = 5632  # ChatGLM's pooled state of 4096 and the six sizes; SDXL has 1280 and the same


def is_kolors_unet(unet: nn.Module) -> bool:
    """Whether a UNet of SDXL's shapes is Kolors': its encoder_hid_proj or its label embedding takes
    ChatGLM's states. For ComfyUI's UNets (as other packs load Kolors) and diffusers'.
    """
    projection = getattr(unet, "encoder_hid_proj", None)
    if getattr(projection, "in_features", None) == KOLORS_TEXT_DIM:
        return True
    for name in ("label_emb.0.0", "add_embedding.linear_1"):
        try:
            label = unet.get_submodule(name)
        except AttributeError:
            continue
        return getattr(label, "in_features", None) == _KOLORS_LABEL_DIM
    return False


def check_compatible(
    spec: AdapterSpec, sites: Sequence[Site], name: str = "The adapter", *, unet: nn.Module | None = None
) -> None:
    """Check that an adapter fits a model's cross-attention sites (in id order); `name` is the file's, for
    the message. `unet` is needed to distinguish Kolors from SDXL, whose sites are the same.

    Raises AdapterError such as "ip-adapter_sdxl is made for SDXL (context 2048); the connected model is
    SD1.5 (768)."
    """
    dims = tuple(site.dim for site in sites)
    context = sites[0].cross_attention_dim if sites else 0
    if dims == spec.layer_dims and context == spec.cross_attention_dim:
        if unet is not None:
            _check_kolors(spec, is_kolors_unet(unet), name)
        return
    if context == spec.cross_attention_dim and len(dims) == len(spec.layer_dims):
        at = next(i for i, (a, b) in enumerate(zip(dims, spec.layer_dims, strict=True)) if a != b)
        raise AdapterError(
            f"{name} is made for another width: its layer {2 * at + 1} is {spec.layer_dims[at]} wide, the connected "
            f"model's {dims[at]}. Use an adapter made for this model."
        )
    family = family_of(context, dims)
    model = FAMILY_NAMES.get(family, "another model")
    detail = f"context {spec.cross_attention_dim}, {len(spec.layer_dims)} layers"
    use = f"Use an {FAMILY_NAMES[family]} adapter." if family in FAMILY_NAMES else "Use an adapter made for this model."
    raise AdapterError(
        f"{name} is made for {spec.family_name} ({detail}); the connected model is {model} ({context}, {len(dims)} "
        f"layers). {use}"
    )


def _check_kolors(spec: AdapterSpec, kolors: bool, name: str) -> None:
    if spec.is_kolors and not kolors:
        raise AdapterError(f"{name} is made for Kolors; the connected model is SDXL. Use an SDXL adapter.")
    if kolors and not spec.is_kolors:
        raise AdapterError(
            f"{name} is made for {spec.family_name}; the connected model is Kolors. Use "
            "ip_adapter_plus_general.bin of Kwai-Kolors/Kolors-IP-Adapter-Plus."
        )


def context_tokens(tokens: Tensor, spec: AdapterSpec, unet: nn.Module, name: str = "The adapter") -> Tensor:
    """Tokens [B, T, token_dim] -> [B, T, cross_attention_dim]. Those of Kolors FaceID have the dim of ChatGLM's
    states and pass the UNet's own encoder_hid_proj; others are returned as they are.

    Raises AdapterError for a Kolors UNet without that layer.
    """
    if spec.token_dim is None:
        return tokens
    projection = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(projection, nn.Linear):
        raise AdapterError(
            f"{name} needs the encoder_hid_proj of Kolors' UNet, which the connected model does not have. Load Kolors "
            "with nodes that keep it in the model, such as ComfyUI-Kolors-MZ."
        )
    weight, bias = (part.to(tokens.device, tokens.dtype) for part in (projection.weight, projection.bias))
    return torch.nn.functional.linear(tokens, weight, bias)
