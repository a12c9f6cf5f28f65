"""LayerWeights: how strongly an image prompt acts in each part of the UNet."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..ipadapter_core import (
    LAYER_GROUPS,
    AdapterError,
    LayerFactors,
    LayerWeight,
    check_compatible,
    cross_attention_sites,
    group_factors,
    layer_weights,
    parse_factors,
    weight_layout,
)
from .message import advanced
from .node import Node
from .types import LayerWeightsType, LoadedAdapter, node_schema

FAMILIES = {"SD1.5": "sd15", "SDXL": "sdxl"}
_CARRIES = {
    "early": "The first layers. SD1.5: transformers 0 to 3, SDXL: 0 to 2. Colours and broad shapes.",
    "composition": "The layers responsible for the layout. SD1.5: 4 and 5, SDXL: 3. Set to 0 to leave the layout to "
    "the text.",
    "middle": "The middle block. SD1.5: 6, SDXL: 4.",
    "content": "The layers responsible for what the image shows. SD1.5: 7 and 8, SDXL: 5. Set to 0 if objects of the "
    "image appear in the result.",
    "style": "The layers responsible for the look. SD1.5: 9 to 12, SDXL: 6. For the style alone, use only these, at "
    "1 to 1.5.",
    "detail": "The last layers. SD1.5: 13 to 15, SDXL: 7 to 10. Textures and colours.",
}
_log = logging.getLogger("ip_adapter_kit")


class LayerWeights(Node):
    """Sliders, or a text -> a factor for each transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sliders = [
            io.Float.Input(
                name,
                default=1.0,
                min=-1.0,
                max=5.0,
                step=0.05,
                display_mode=io.NumberDisplay.slider,
                optional=True,
                tooltip=_CARRIES[name],
            )
            for name in LAYER_GROUPS
        ]
        return node_schema(
            node_id="LayerWeights",
            display_name="Layer Weights",
            description="How strongly an image prompt acts in each part of the UNet. Multiplies the weight of Apply IP "
            "Adapter.",
            inputs=[
                io.Combo.Input(
                    "family",
                    options=list(FAMILIES),
                    default="SDXL",
                    tooltip="The model that the weights are for. SD1.5 also fits SD2; SDXL also fits Kolors and Pony.",
                ),
                *sliders,
                io.String.Input(
                    "layers",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Weights per transformer, instead of the sliders: index:weight, such as 3:2.5, 6:1. "
                    "Those that are not listed get 0. Texts of Mad Scientist nodes work here.",
                    **advanced(),
                ),
            ],
            outputs=[LayerWeightsType.Output(display_name="layer_weights", tooltip="Connect to Apply IP Adapter.")],
        )

    @classmethod
    def execute(cls, family: str, layers: str = "", **groups: float) -> io.NodeOutput:
        if not layers.strip():
            return io.NodeOutput(group_factors(FAMILIES[family], groups))
        moved = [name for name, factor in groups.items() if factor != 1.0]
        if moved:
            _log.warning("Layer Weights: layers is used instead of the sliders; %s have no effect.", ", ".join(moved))
        return io.NodeOutput(parse_factors(FAMILIES[family], layers))


def model_weights(
    model: Any,
    ip_adapter: LoadedAdapter,
    weight_type: str,
    weight: float,
    factors: LayerFactors | None = None,
    boost: float = 1.0,
) -> tuple[tuple[LayerWeight, ...], str]:
    """One weight for each transformer of the model, and the name of the input that needs the negative branch ("" for
    none). `boost` is in parts of `weight`.

    Raises AdapterError for what is not for this model, and for factors that leave nothing of the weight type.
    """
    unet = model.get_model_object("diffusion_model")
    sites = cross_attention_sites(unet)
    check_compatible(ip_adapter.spec, sites, ip_adapter.name, unet=unet)
    layout = weight_layout(sites)
    weights = layer_weights(weight_type, layout, weight, weight_composition=weight, boost=weight * boost)
    swapped = any(layer.swapped for layer in weights)
    if boost != 1.0 and not swapped:
        _log.warning(
            "Apply IP Adapter: boost %g acts with the precise weight types only, not with %r.", boost, weight_type
        )
    if factors is not None:
        scaled = factors.scale(weights, layout)
        if weight and not any(factors.factors):
            raise AdapterError(
                "layer_weights are 0 in all layers, so the image prompt would act nowhere. Raise one of them, or set "
                "weight to 0 to switch the image prompt off."
            )
        if any(layer.weight for layer in weights) and not any(layer.weight for layer in scaled):
            raise AdapterError(
                f"layer_weights are 0 in all layers in which weight_type {weight_type!r} acts, so the image prompt "
                "would act nowhere. Use weight_type 'linear', or other layers."
            )
        weights = scaled
    return weights, f"weight_type {weight_type!r}" if swapped else ""
