"""Once, when the node runs: put an image prompt, as keys and values of every layer, into a clone of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ..ipadapter_core import (
    AdapterError,
    KeyValue,
    LayerWeight,
    Scaling,
    Site,
    WeightSchedule,
    check_compatible,
    context_tokens,
    cross_attention_sites,
)
from ..ipadapter_core.attention import split_heads
from ..ipadapter_core.branches import branch_rows, fold_weights
from ..ipadapter_core.masks import check_attention_mask, check_mask, mask_planes
from .application import Application
from .checks import check_acts, check_prompt, check_strength, largest
from .lora import LORA_STRENGTH, add_lora
from .patch import SitePatch
from .run import RUN, Place
from .start_run import start_run
from .types import ImagePrompt, LoadedAdapter, project

_KEY = "ip_adapter_kit."
_Wrappers = comfy.patcher_extension.WrappersMP


def apply_prompt(
    model: Any,
    ip_adapter: LoadedAdapter,
    image_prompt: ImagePrompt,
    *,
    node: str,
    weights: Sequence[LayerWeight],
    start_at: float = 0.0,
    end_at: float = 1.0,
    scaling: Scaling = "V only",
    attn_mask: Tensor | None = None,
    mask_name: str = "attn_mask",
    lora_strength: float = LORA_STRENGTH,
    schedule: WeightSchedule | None = None,
    token_scale: float = 1.0,
    needs_negative: str = "",
    checked: bool = True,
) -> Any:
    """A clone of the model with one more image prompt in it.

    `weights`: one for each transformer of the UNet, by `Site.transformer_index`. `schedule` multiplies them.
    `lora_strength`: of the LoRA inside a FaceID file, in every step. `token_scale` multiplies the tokens.
    `needs_negative`: the input that acts in the negative branch only. `mask_name`: the input of the mask. `node`: the
    title of the node, for the log. Without `checked`, for the old nodes, an image prompt may have no effect, and a
    mask may have values outside 0..1.

    Raises AdapterError when the adapter is for another model, the prompt for another adapter, or the image prompt
    would have no effect although the weight is not 0.
    """
    unet = model.get_model_object("diffusion_model")
    sites = cross_attention_sites(unet)
    check_compatible(ip_adapter.spec, sites, ip_adapter.name, unet=unet)
    check_prompt(ip_adapter, image_prompt)
    strength = largest(layer.weight * own for layer in weights for own in image_prompt.positive.weights)
    check_strength(strength)
    check = mask_planes
    if checked:
        check_acts(strength, start_at, end_at, scaling, sites)
        check = check_attention_mask if strength else check_mask
    mask = None if attn_mask is None else check(attn_mask, mask_name)
    if schedule is not None and scaling != "V only":
        raise AdapterError(
            f"A weight schedule multiplies the result of the image attention, embeds_scaling {scaling!r} the keys, "
            "which are made once. Use 'V only' with a schedule."
        )
    patched = model.clone()
    if not patched.get_wrappers(_Wrappers.SAMPLER_SAMPLE, RUN):
        patched.add_wrapper_with_key(_Wrappers.SAMPLER_SAMPLE, RUN, start_run)
    if not strength:
        switch_off(patched)
        return patched
    add_lora(patched, ip_adapter, sites, lora_strength)
    dtype = _inference_dtype(model)
    rows, pairs = _layer_pairs(ip_adapter, image_prompt, sites, weights, scaling, dtype, unet, token_scale)
    negative = "image_negative" if image_prompt.has_negative else needs_negative
    key = _new_key(patched)
    install(
        patched, Application(key, node, pairs, rows, start_at, end_at, mask, negative, schedule, mask_name, checked)
    )
    return patched


def install(patched: Any, application: Application) -> None:
    """Put the patches and the wrapper of one application into a new clone of a model."""
    before = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for place in application.pairs:
        stage, number, index = place
        # ComfyUI looks for the block's own key first, then for the one of all blocks of this transformer.
        previous = before.get(place) or before.get((stage, number))
        patched.set_model_attn2_replace(SitePatch(application, place, previous), stage, number, index)
        # All blocks of the transformer have our patch now, so its common patch is not needed. See `start_run`.
        patched.model_options["transformer_options"]["patches_replace"]["attn2"].pop((stage, number), None)
    patched.add_wrapper_with_key(_Wrappers.APPLY_MODEL, application.key, application)


def switch_off(patched: Any) -> None:
    """An image prompt that is off keeps its number, for Attention Map: a key without a wrapper, which no step calls."""
    patched.wrappers.setdefault(_Wrappers.APPLY_MODEL, {})[_new_key(patched)] = []


def prompts_of(model: Any) -> dict[str, bool]:
    """The keys of all image prompts of a model, in the order of their nodes, and which of them are on."""
    found = model.wrappers.get(_Wrappers.APPLY_MODEL, {}).items()
    return {
        key: bool(items)
        for key, items in found
        if str(key).startswith(_KEY) and all(isinstance(item, Application) for item in items)
    }


def _new_key(model: Any) -> str:
    """A key of this model that no earlier application has; the same graph gives the same key."""
    taken = model.wrappers.get(_Wrappers.APPLY_MODEL, {})
    count = sum(str(key).startswith(_KEY) for key in taken)
    return f"{_KEY}{count}"


def _layer_pairs(
    ip_adapter: LoadedAdapter,
    image_prompt: ImagePrompt,
    sites: Sequence[Site],
    weights: Sequence[LayerWeight],
    scaling: Scaling,
    dtype: torch.dtype,
    unet: torch.nn.Module,
    token_scale: float = 1.0,
) -> tuple[tuple[int, int], dict[Place, KeyValue]]:
    """The rows of both branches, and the keys and values of every layer whose weight is not 0: [rows, H, T, d] with
    all weights folded in, computed in fp32, on the offload device in the model's `dtype`.
    """
    adapter, device = ip_adapter.on_device(), ip_adapter.patcher.load_device
    tokens = context_tokens(project(ip_adapter, image_prompt).to(device), adapter.spec, unet, ip_adapter.name)
    tokens = tokens * token_scale
    positives, one_each = len(image_prompt.positive), image_prompt.one_each
    shares = image_prompt.weights
    if one_each and len(tokens) == positives + 1 and len(set(shares[:positives])) > 1:
        # The single negative serves every frame that its image acts in. Zeros have the weight of that image.
        tokens = torch.cat([tokens[:positives], tokens[positives:].expand(positives, -1, -1)])
        own, given = shares[:positives], image_prompt.negative is not None
        shares = (*own, *(shares[positives] if given and weight else weight for weight in own))
    swapped = any(layer.swapped and layer.weight for layer in weights)
    rows = branch_rows(positives, len(tokens) - positives, one_each=one_each, swapped=swapped)
    offload_device = comfy.model_management.unet_offload_device()
    pairs: dict[Place, KeyValue] = {}
    # One layer at a time: with an image for each frame of a video all layers would not fit on the device.
    for site, (to_k, to_v) in zip(sites, adapter.layers.pairs(), strict=True):
        weight = weights[site.transformer_index]
        if weight.weight == 0.0:
            continue
        pair = KeyValue(to_k(tokens), to_v(tokens))
        folded = fold_weights(pair, weight, shares, rows, scaling, positives=positives, one_each=one_each)
        if folded is not None and site.block is not None:
            parts = [part.to(offload_device, dtype) for part in folded]
            if not all(part.isfinite().all() for part in parts):
                raise AdapterError(
                    f"The weights of the image prompt, {weight.weight:g} in layer {site.id}, are too large for the "
                    f"model's {str(dtype).removeprefix('torch.')}. Lower them."
                )
            pairs[site.block] = KeyValue(*(split_heads(part, site.heads).contiguous() for part in parts))
    return rows, pairs


def _inference_dtype(model: Any) -> torch.dtype:
    """The dtype in which the model's layers calculate."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
