"""ApplyIPAdapter: add an image prompt to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import (
    SCALINGS,
    WEIGHT_TYPES,
    AdapterError,
    LayerFactors,
    Scaling,
    WeightSchedule,
    parse_weight_type,
)
from .install import apply_prompt
from .layer_weights import model_weights
from .lora import LORA_STRENGTH
from .message import advanced
from .node import Node
from .types import (
    ImagePrompt,
    ImagePromptType,
    IPAdapterModel,
    LayerWeightsType,
    LoadedAdapter,
    WeightScheduleType,
    node_schema,
)


class ApplyIPAdapter(Node):
    """Model, adapter and image prompt -> the model with the image prompt in every cross-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="ApplyIPAdapter",
            display_name="Apply IP Adapter",
            description="Guides the model with an image, in addition to the text. Chain several nodes for several "
            "image prompts.",
            inputs=[
                io.Model.Input("model", tooltip="The SD1.5, SD2, SDXL or Kolors model that the adapter was made for."),
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter."),
                ImagePromptType.Input(
                    "image_prompt",
                    optional=True,
                    tooltip="From Encode Image Prompt, with the same adapter. If it is missing, for example because "
                    "that node is bypassed, the model is passed on unchanged.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Strength of the image. 0.5 to 0.8 with a text, 1 without; 0 is off.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="linear",
                    optional=True,
                    tooltip="How the weight is distributed over the layers. linear: equally. style transfer and "
                    "composition act only in the layers responsible for style or composition.",
                ),
                io.Float.Input(
                    "start_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="Where in the noise schedule the image starts to act; 0 is the first step. Try 0.2 to "
                    "leave the layout to the text.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="Where in the noise schedule the image stops acting; 1 is the last step. Try 0.8 to "
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
                    tooltip="Where in the result the image acts: 0 not at all, 1 fully. Any size; a batch of masks "
                    "has one for each image of the batch.",
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
                    tooltip="For the precise weight types: how strongly the other layers push away unwanted content, "
                    "as a multiple of weight. 1 is as strong as weight; try 0.5 to 2.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect to the sampler. The input model is not changed.")
            ],
        )

    @classmethod
    def validate_inputs(cls, weight_type: str | None = None) -> bool | str:
        """Accepts former names too, which ComfyUI's own check of the list would refuse; None is a connected input."""
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
            node="Apply IP Adapter",
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
