"""ImagePromptRegions: an image prompt and a text for each region of the result."""

from __future__ import annotations

import logging
from typing import Any

import node_helpers
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import WEIGHT_TYPES, AdapterError, parse_weight_type
from ..ipadapter_core.masks import check_attention_mask
from .install import apply_prompt
from .layer_weights import model_weights
from .node import Node
from .run import REGION
from .types import ImagePrompt, ImagePromptType, IPAdapterModel, LoadedAdapter, node_schema

REGIONS = 4
_log = logging.getLogger("ip_adapter_kit")


class ImagePromptRegions(Node):
    """Masks with a text and an image prompt each -> model and positive conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        regions = [item for number in range(1, REGIONS + 1) for item in _inputs(number)]
        return node_schema(
            node_id="ImagePromptRegions",
            display_name="Image Prompt Regions",
            description="Up to four regions of the result, each with its own image prompt, text and weight.",
            inputs=[
                io.Model.Input("model", tooltip="The SD1.5, SD2, SDXL or Kolors model that the adapter was made for."),
                IPAdapterModel.Input("ip_adapter", tooltip="The adapter of all image prompts."),
                io.Conditioning.Input(
                    "positive", tooltip="The text for the whole result. The texts of the regions are added to it."
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="linear",
                    optional=True,
                    tooltip="How the weights are distributed over the layers, as in Apply IP Adapter.",
                ),
                *regions,
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Connect to the sampler. The input model is not changed."
                ),
                io.Conditioning.Output(
                    display_name="positive", tooltip="Connect to the sampler: all texts, each in its region."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, weight_type: str | None = None) -> bool | str:
        """As in Apply IP Adapter."""
        try:
            return weight_type is None or bool(parse_weight_type(weight_type))
        except AdapterError as error:
            return str(error)

    @classmethod
    def execute(
        cls, model: Any, ip_adapter: LoadedAdapter, positive: Any, weight_type: str = "linear", **inputs: Any
    ) -> io.NodeOutput:
        masks = _masks(inputs)
        if not masks:
            _log.warning(
                "Image Prompt Regions: no region has a mask and an image prompt or a text, so nothing changes."
            )
        for number, mask in masks.items():
            prompt: ImagePrompt | None = inputs.get(f"image_prompt_{number}")
            text: Any = inputs.get(f"positive_{number}")
            if prompt is not None:
                weight = inputs.get(f"weight_{number}", 1.0)
                weights, negative = model_weights(model, ip_adapter, weight_type, weight)
                model = apply_prompt(
                    model,
                    ip_adapter,
                    prompt,
                    weights=weights,
                    attn_mask=mask,
                    mask_name=f"mask_{number}",
                    needs_negative=negative,
                    node="Image Prompt Regions",
                )
            if text is not None:
                region = {"mask": mask, "set_area_to_bounds": False, "mask_strength": 1.0, REGION: True}
                positive = positive + node_helpers.conditioning_set_values(text, region)
        return io.NodeOutput(model, positive)


def _masks(inputs: dict[str, Any]) -> dict[int, Tensor]:
    """By number, the masks of the regions that do something; what is left out is logged.

    Raises AdapterError for masks of different sizes, and for what is no mask.
    """
    masks: dict[int, Tensor] = {}
    for number in range(1, REGIONS + 1):
        mask = inputs.get(f"mask_{number}")
        filled = [name for name in ("image_prompt", "positive") if inputs.get(f"{name}_{number}") is not None]
        if mask is not None and filled:
            what = "image prompt" if "image_prompt" in filled else "text"
            masks[number] = check_attention_mask(mask, f"mask_{number}", what=what)
        elif mask is not None or filled:
            missing = f"mask_{number}" if filled else f"image_prompt_{number} and positive_{number}"
            _log.warning("Image Prompt Regions: region %d is left out, because it has no %s.", number, missing)
    sizes = {number: (mask.shape[-1], mask.shape[-2]) for number, mask in masks.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"mask_{number} {width} x {height}" for number, (width, height) in sizes.items())
        raise AdapterError(f"The masks of the regions differ in size: {listed}. Use masks of the same image.")
    return masks


def _inputs(number: int) -> list[Any]:
    return [
        io.Mask.Input(
            f"mask_{number}",
            optional=True,
            tooltip=f"Where region {number} is: 1 inside, 0 outside. Where masks overlap, image prompts add up and "
            "texts are averaged.",
        ),
        ImagePromptType.Input(
            f"image_prompt_{number}", optional=True, tooltip=f"The image prompt of region {number}, if it has one."
        ),
        io.Conditioning.Input(
            f"positive_{number}", optional=True, tooltip=f"The text of region {number}, if it has one of its own."
        ),
        io.Float.Input(
            f"weight_{number}",
            default=1.0,
            min=-1.0,
            max=5.0,
            step=0.05,
            optional=True,
            tooltip=f"Strength of the image in region {number}. 0.6 to 0.9 with a text; 0 is off.",
        ),
    ]
