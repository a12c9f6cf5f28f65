"""ApplyIPAdapter: a model that listens to an image prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import (
    SCALINGS,
    WEIGHT_TYPES,
    AdapterError,
    KeyValue,
    LayerWeight,
    Scaling,
    Site,
    check_compatible,
    cross_attention_sites,
    layer_weights,
    parse_weight_type,
    weight_layout,
)
from ..ipadapter_core.branches import fold_weights
from ..ipadapter_core.masks import check_attention_mask, check_mask
from .calls import RUN
from .checks import check_acts, check_prompt
from .patch import SitePatch
from .run import start_run
from .steps import Application
from .types import ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema

_KEY = "ip_adapter_kit."
_Wrappers = comfy.patcher_extension.WrappersMP


class ApplyIPAdapter(io.ComfyNode):
    """Model, adapter and image prompt -> the model with the image prompt in every cross-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="ApplyIPAdapter",
            display_name="Apply IP Adapter",
            description="Lets a picture steer the model, beside the text. Chain several for several prompts.",
            inputs=[
                io.Model.Input("model", tooltip="The SD1.5, SD2 or SDXL model that the adapter was made for."),
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter."),
                ImagePromptType.Input("image_prompt", tooltip="From Encode Image Prompt, with the same adapter."),
                io.Float.Input(
                    "weight", default=1.0, min=-1.0, max=5.0, step=0.05, tooltip="Strength of the picture; 0 is off."
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="linear",
                    optional=True,
                    tooltip="How the weight is spread over the layers. linear: all alike. style transfer and "
                    "composition act only in the layers that carry style or composition.",
                ),
                io.Float.Input(
                    "start_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="From which part of the noise schedule on the picture acts; 0 is the first step.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="Up to which part of the noise schedule the picture acts; 1 is the last step.",
                ),
                io.Combo.Input(
                    "embeds_scaling",
                    options=list(SCALINGS),
                    default="V only",
                    optional=True,
                    tooltip="What the weight multiplies. V only: the result of the image attention. The others also "
                    "scale the keys, which sharpens or blurs what the layers look at.",
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the result the picture acts: 0 nowhere, 1 fully. Any size; a batch of masks "
                    "gives each picture of a batch its own.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler; the input stays as it was.")],
        )

    @classmethod
    def validate_inputs(cls, weight_type: str | None = None) -> bool | str:
        """Instead of ComfyUI's look into the list, so that former names pass; None comes over a wire."""
        try:
            return weight_type is None or bool(parse_weight_type(weight_type))
        except AdapterError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: LoadedAdapter,
        image_prompt: ImagePrompt,
        weight: float = 1.0,
        weight_type: str = "linear",
        start_at: float = 0.0,
        end_at: float = 1.0,
        embeds_scaling: Scaling = "V only",
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        unet = model.get_model_object("diffusion_model")
        sites = cross_attention_sites(unet)
        check_compatible(ip_adapter.spec, sites, ip_adapter.name, unet=unet)
        check_prompt(ip_adapter, image_prompt)
        strength = weight * image_prompt.weight
        check_acts(strength, start_at, end_at, embeds_scaling, sites)
        mask = None if attn_mask is None else (check_attention_mask if strength else check_mask)(attn_mask, "attn_mask")
        patched = model.clone()
        weights = layer_weights(weight_type, weight_layout(sites), strength, weight_composition=strength)
        pairs = layer_pairs(ip_adapter, image_prompt, sites, weights, embeds_scaling, inference_dtype(model))
        swapped = any(layer.swapped for layer in weights)
        negative = "image_negative" if image_prompt.has_negative else f"weight_type {weight_type!r}" if swapped else ""
        install(patched, Application(_new_key(patched), start_at, end_at, mask, negative), sites, pairs)
        return io.NodeOutput(patched)


def layer_pairs(
    ip_adapter: LoadedAdapter,
    image_prompt: ImagePrompt,
    sites: Sequence[Site],
    weights: Sequence[LayerWeight],
    scaling: Scaling,
    dtype: torch.dtype,
) -> list[KeyValue | None]:
    """Keys and values of every site, both branches and all weights inside, on the offload device; None where the
    weight is 0. Computed in fp32 where ComfyUI puts the adapter, kept in the model's `dtype`.
    """
    if all(weight.weight == 0.0 for weight in weights):
        return [None] * len(sites)
    adapter = ip_adapter.on_device()
    device, home = ip_adapter.patcher.load_device, comfy.model_management.unet_offload_device()
    tokens = torch.cat([image_prompt.positive, image_prompt.negative]).to(device, torch.float32)
    pairs: list[KeyValue | None] = []
    for site, (key, value) in zip(sites, adapter.keys_values(tokens), strict=True):
        folded = fold_weights(
            KeyValue(key[:1], value[:1]),
            KeyValue(key[1:], value[1:]),
            weights[site.transformer_index],
            scaling,
            images=image_prompt.images,
        )
        pairs.append(folded and KeyValue(*(part.to(home, dtype) for part in folded)))
    return pairs


def install(patched: Any, application: Application, sites: Sequence[Site], pairs: Sequence[KeyValue | None]) -> None:
    """Put the patches and wrappers of one application into a model that nobody else holds yet."""
    if not patched.get_wrappers(_Wrappers.SAMPLER_SAMPLE, RUN):
        patched.add_wrapper_with_key(_Wrappers.SAMPLER_SAMPLE, RUN, start_run)
    if all(pair is None for pair in pairs):
        return
    before = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for site, pair in zip(sites, pairs, strict=True):
        if pair is None:
            continue
        stage, number, index = site.block
        # ComfyUI looks for the block's own key first, then for the one of all blocks of this transformer.
        previous = before.get((stage, number, index)) or before.get((stage, number))
        patch = SitePatch(application.key, pair, pair, previous)
        patched.set_model_attn2_replace(patch, stage, number, index)
        # A weight is that of a whole transformer, so ours now stand in all places of that key. See `start_run`.
        patched.model_options["transformer_options"]["patches_replace"]["attn2"].pop((stage, number), None)
    patched.add_wrapper_with_key(_Wrappers.APPLY_MODEL, application.key, application)


def inference_dtype(model: Any) -> torch.dtype:
    """The dtype in which the model's layers calculate."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def _new_key(model: Any) -> str:
    """A key of this model that no earlier application has; the same graph gives the same key."""
    taken = model.wrappers.get(_Wrappers.APPLY_MODEL, {})
    count = sum(str(key).startswith(_KEY) for key in taken)
    return f"{_KEY}{count}"
