"""ApplyIPAdapter: a model that listens to an image prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import (
    SCALINGS,
    WEIGHT_TYPES,
    AdapterError,
    LayerFactors,
    LayerWeight,
    Scaling,
    WeightSchedule,
    check_compatible,
    cross_attention_sites,
    parse_weight_type,
)
from ..ipadapter_core.masks import check_attention_mask, check_mask, mask_planes
from .calls import RUN
from .checks import check_acts, check_prompt, check_strength, largest
from .keys_values import inference_dtype, layer_pairs
from .layer_weights import model_weights
from .lora import LORA_STRENGTH, add_lora
from .message import advanced
from .node import Node
from .patch import SitePatch
from .run import start_run
from .steps import Application
from .types import (
    ImagePrompt,
    ImagePromptType,
    IPAdapterModel,
    LayerWeightsType,
    LoadedAdapter,
    WeightScheduleType,
    node_schema,
)

_KEY = "ip_adapter_kit."
_Wrappers = comfy.patcher_extension.WrappersMP


class ApplyIPAdapter(Node):
    """Model, adapter and image prompt -> the model with the image prompt in every cross-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="ApplyIPAdapter",
            display_name="Apply IP Adapter",
            description="Lets an image steer the model, beside the text. Chain several for several image prompts.",
            inputs=[
                io.Model.Input("model", tooltip="The SD1.5, SD2 or SDXL model that the adapter was made for."),
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter."),
                ImagePromptType.Input(
                    "image_prompt",
                    optional=True,
                    tooltip="From Encode Image Prompt, with the same adapter. Without it, as when that node is "
                    "bypassed, the model is passed on as it is.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Strength of the image. 0.5 to 0.8 beside a text, 1 without; 0 is off.",
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
                    tooltip="From which part of the noise schedule on the image acts; 0 is the first step. Try 0.2 to "
                    "leave the layout to the text.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="Up to which part of the noise schedule the image acts; 1 is the last step. Try 0.8 to "
                    "leave the details to the text.",
                ),
                io.Combo.Input(
                    "embeds_scaling",
                    options=list(SCALINGS),
                    default="V only",
                    optional=True,
                    tooltip="What the weight multiplies. V only: the result of the image attention. The others also "
                    "scale the keys, which sharpens or blurs what the layers look at.",
                    **advanced(),
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the result the image acts: 0 nowhere, 1 fully. Any size; a batch of masks "
                    "gives each image of a batch its own.",
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
                LayerWeightsType.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="From Layer Weights: multiplies the weight that weight_type gives to each layer.",
                ),
                WeightScheduleType.Input(
                    "weight_schedule",
                    optional=True,
                    tooltip="From Weight Schedule: multiplies the weight in each step, or for each frame.",
                ),
                io.Float.Input(
                    "boost",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="For the precise weight types: how strongly, in parts of weight, the other layers push "
                    "away what should not come along. 1 is as strong as weight; try 0.5 to 2.",
                    **advanced(),
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
        image_prompt: ImagePrompt | None = None,
        weight: float = 1.0,
        weight_type: str = "linear",
        start_at: float = 0.0,
        end_at: float = 1.0,
        embeds_scaling: Scaling = "V only",
        attn_mask: Tensor | None = None,
        lora_strength: float = LORA_STRENGTH,
        layer_weights: LayerFactors | None = None,
        weight_schedule: WeightSchedule | None = None,
        boost: float = 1.0,
    ) -> io.NodeOutput:
        if image_prompt is None:
            return io.NodeOutput(model)
        weights, needs_negative = model_weights(model, ip_adapter, weight_type, weight, layer_weights, boost)
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
            schedule=weight_schedule,
            needs_negative=needs_negative,
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
    mask_name: str = "attn_mask",
    lora_strength: float = LORA_STRENGTH,
    schedule: WeightSchedule | None = None,
    token_scale: float = 1.0,
    needs_negative: str = "",
    checked: bool = True,
    node: str = "Apply IP Adapter",
) -> Any:
    """A clone of the model with one more image prompt in it. `weights` is one for each transformer of the UNet, see
    `Site.transformer_index`; `schedule` multiplies all of them; `lora_strength` is that of the LoRA inside a FaceID
    file, which acts in every step; `token_scale` multiplies keys and values alike; `needs_negative` names the input
    that acts in the negative branch alone, `mask_name` that of the mask, `node` the node, for the log. Without
    `checked`, for the old names, an image prompt may act nowhere, and a mask may leave 0..1.

    Raises AdapterError when the adapter is not made for the model, the prompt not for the adapter, or nothing would
    come of it although the weight is not 0.
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
        return patched
    add_lora(patched, ip_adapter, sites, lora_strength)
    dtype = inference_dtype(model)
    rows, pairs = layer_pairs(ip_adapter, image_prompt, sites, weights, scaling, dtype, unet, token_scale)
    negative = "image_negative" if image_prompt.has_negative else needs_negative
    key = _new_key(patched)
    install(
        patched, Application(key, pairs, rows, start_at, end_at, mask, negative, schedule, mask_name, checked, node)
    )
    return patched


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


def _new_key(model: Any) -> str:
    """A key of this model that no earlier application has; the same graph gives the same key."""
    taken = model.wrappers.get(_Wrappers.APPLY_MODEL, {})
    count = sum(str(key).startswith(_KEY) for key in taken)
    return f"{_KEY}{count}"
