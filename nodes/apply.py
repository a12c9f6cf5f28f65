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
    context_tokens,
    cross_attention_sites,
    layer_weights,
    parse_weight_type,
    weight_layout,
)
from ..ipadapter_core.attention import split_heads
from ..ipadapter_core.branches import branch_rows, fold_weights
from ..ipadapter_core.masks import check_attention_mask, check_mask
from .calls import RUN
from .checks import check_acts, check_prompt, largest
from .lora import LORA_STRENGTH, add_lora
from .patch import SitePatch
from .run import start_run
from .steps import Application, Place
from .types import ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema, project

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
                io.Float.Input(
                    "lora_strength",
                    default=LORA_STRENGTH,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="Strength of the LoRA inside a FaceID file; other adapters have none. 0.6 follows the text "
                    "better, 1 is as trained. 0 when the LoRA is loaded from its own file.",
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
        lora_strength: float = LORA_STRENGTH,
    ) -> io.NodeOutput:
        unet = model.get_model_object("diffusion_model")
        sites = cross_attention_sites(unet)
        check_compatible(ip_adapter.spec, sites, ip_adapter.name, unet=unet)
        weights = layer_weights(weight_type, weight_layout(sites), weight, weight_composition=weight)
        patched = apply_prompt(
            model,
            ip_adapter,
            image_prompt,
            weights=weights,
            start_at=start_at,
            end_at=end_at,
            scaling=embeds_scaling,
            attn_mask=attn_mask,
            lora_strength=lora_strength,
            needs_negative=f"weight_type {weight_type!r}" if any(layer.swapped for layer in weights) else "",
        )
        return io.NodeOutput(patched)


def apply_prompt(
    model: Any,
    ip_adapter: LoadedAdapter,
    image_prompt: ImagePrompt,
    *,
    weights: Sequence[LayerWeight],
    start_at: float = 0.0,
    end_at: float = 1.0,
    scaling: Scaling = "V only",
    attn_mask: Tensor | None = None,
    lora_strength: float = LORA_STRENGTH,
    token_scale: float = 1.0,
    needs_negative: str = "",
    checked: bool = True,
) -> Any:
    """A clone of the model with one more image prompt in it. `weights` is one for each transformer of the UNet, see
    `Site.transformer_index`; `lora_strength` is that of the LoRA inside a FaceID file, which acts in every step;
    `token_scale` multiplies the tokens, keys and values alike; `needs_negative` names the input that acts in the
    negative branch alone. Without `checked` an image prompt may act nowhere, and a mask is taken as it is, outside 0..1
    too.

    Raises AdapterError when the adapter is not made for the model, the prompt not for the adapter, or nothing would
    come of it although the weight is not 0.
    """
    unet = model.get_model_object("diffusion_model")
    sites = cross_attention_sites(unet)
    check_compatible(ip_adapter.spec, sites, ip_adapter.name, unet=unet)
    check_prompt(ip_adapter, image_prompt)
    strength = largest(layer.weight * own for layer in weights for own in image_prompt.positive.weights)
    mask = attn_mask
    if checked:
        check_acts(strength, start_at, end_at, scaling, sites)
        check = check_attention_mask if strength else check_mask
        mask = None if attn_mask is None else check(attn_mask, "attn_mask")
    patched = model.clone()
    if not patched.get_wrappers(_Wrappers.SAMPLER_SAMPLE, RUN):
        patched.add_wrapper_with_key(_Wrappers.SAMPLER_SAMPLE, RUN, start_run)
    if not strength:
        return patched
    add_lora(patched, ip_adapter, sites, lora_strength)
    rows, pairs = layer_pairs(
        ip_adapter, image_prompt, sites, weights, scaling, inference_dtype(model), unet, token_scale
    )
    negative = "image_negative" if image_prompt.has_negative else needs_negative
    install(patched, Application(_new_key(patched), pairs, rows, start_at, end_at, mask, negative, checked))
    return patched


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
    weights inside, on the offload device. Computed in fp32, kept in the model's `dtype`.
    """
    adapter, device = ip_adapter.on_device(), ip_adapter.patcher.load_device
    tokens = context_tokens(project(ip_adapter, image_prompt).to(device), adapter.spec, unet, ip_adapter.name)
    positives, one_each = len(image_prompt.positive), image_prompt.one_each
    swapped = any(layer.swapped and layer.weight for layer in weights)
    rows = branch_rows(positives, len(tokens) - positives, one_each=one_each, swapped=swapped)
    home = comfy.model_management.unet_offload_device()
    pairs: dict[Place, KeyValue] = {}
    for site, pair in zip(sites, adapter.keys_values(tokens * token_scale), strict=True):
        weight = weights[site.transformer_index]
        folded = fold_weights(pair, weight, image_prompt.weights, rows, scaling, positives=positives, one_each=one_each)
        if folded is not None and site.block is not None:
            parts = (part.to(home, dtype) for part in folded)
            pairs[site.block] = KeyValue(*(split_heads(part, site.heads, len(part)).contiguous() for part in parts))
    return rows, pairs


def install(patched: Any, application: Application) -> None:
    """Put the patches and the wrapper of one application into a model that nobody else holds yet."""
    before = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for place in application.pairs:
        stage, number, index = place
        # ComfyUI looks for the block's own key first, then for the one of all blocks of this transformer.
        previous = before.get(place) or before.get((stage, number))
        patched.set_model_attn2_replace(SitePatch(application, place, previous), stage, number, index)
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
