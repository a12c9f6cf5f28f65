"""RecordAttentionMap and ImagePromptAttentionMap: a heat map of an image prompt's attention."""

from __future__ import annotations

import logging
from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io, ui
from torch import Tensor

from ..ipadapter_core import (
    LAYER_GROUPS,
    AdapterError,
    cross_attention_sites,
    draw_heat,
    weight_layout,
)
from .install import prompts_of
from .message import advanced
from .node import Node
from .patch import SitePatch
from .record import Record
from .types import AttentionRecordType, node_schema

_KEY = "ip_adapter_kit.record"
_LAST = 10000  # as in KSampler (Advanced)
_Wrappers = comfy.patcher_extension.WrappersMP
_log = logging.getLogger("ip_adapter_kit")


class RecordAttentionMap(Node):
    """A model with image prompts -> a clone that records their attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="RecordAttentionMap",
            display_name="Record Attention Map",
            description="Records where the image prompts act during sampling, for Attention Map. The generated "
            "images do not change.",
            inputs=[io.Model.Input("model", tooltip="From the last Apply IP Adapter.")],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect to the sampler."),
                AttentionRecordType.Output(display_name="record", tooltip="Connect to Attention Map."),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        patched = model.clone()
        attn2 = patched.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
        patches = {place: patch for place, patch in attn2.items() if isinstance(patch, SitePatch)}
        if any(patch.record is not None for patch in patches.values()):
            raise AdapterError(
                "This model is recorded already. Use one Record Attention Map, after the last Apply IP Adapter."
            )
        prompts = prompts_of(patched)
        sites = cross_attention_sites(patched.get_model_object("diffusion_model"))
        transformers = {site.block[:2]: site.transformer_index for site in sites if site.block is not None}
        off = frozenset(key for key, is_on in prompts.items() if not is_on)
        record = Record(tuple(prompts), weight_layout(sites), transformers, off)
        for (stage, number, index), patch in patches.items():
            patched.set_model_attn2_replace(patch.recorded(record), stage, number, index)
        if patches:
            patched.add_wrapper_with_key(_Wrappers.SAMPLER_SAMPLE, _KEY, record.sample)
            patched.add_wrapper_with_key(_Wrappers.APPLY_MODEL, _KEY, record)
        else:
            _log.warning("Record Attention Map: no image prompt acts in the connected model.")
        return io.NodeOutput(patched, record)


class ImagePromptAttentionMap(Node):
    """A record and the images of its run -> a heat map over them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="ImagePromptAttentionMap",
            display_name="Attention Map",
            description="Shows where in the result the image prompt acted, as a heat map over the image.",
            is_output_node=True,
            inputs=[
                AttentionRecordType.Input("record", tooltip="From Record Attention Map; sample with its model."),
                io.Image.Input("image", tooltip="The images that were sampled, from VAE Decode."),
                io.Combo.Input(
                    "layers",
                    options=["all", *LAYER_GROUPS],
                    default="all",
                    optional=True,
                    tooltip="The part of the UNet to show, as in Layer Weights.",
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=_LAST,
                    optional=True,
                    tooltip="The first step to show. The layout is decided in the first steps, details in the last.",
                ),
                io.Int.Input(
                    "end_at_step",
                    default=_LAST,
                    min=1,
                    max=_LAST,
                    optional=True,
                    tooltip="Up to this step, which is not included. 10000 is all steps.",
                ),
                io.Int.Input(
                    "prompt",
                    default=0,
                    min=0,
                    max=99,
                    optional=True,
                    tooltip="Which image prompt to show: 1 is that of the first Apply IP Adapter, 0 is all of them "
                    "together.",
                ),
                io.Combo.Input(
                    "scale",
                    options=["relative", "absolute"],
                    default="relative",
                    optional=True,
                    tooltip="relative: dark where the image prompt acts least, bright where it acts most. absolute: "
                    "the share of the image prompt in the attention, from none to all; use it to compare maps.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much the map covers the image. 1 is the map alone.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The images with the map over them."),
                io.Mask.Output(display_name="map", tooltip="Only the map; it can also be used as a mask."),
            ],
        )

    @classmethod
    def execute(
        cls,
        record: Record,
        image: Tensor,
        layers: str = "all",
        start_at_step: int = 0,
        end_at_step: int = _LAST,
        prompt: int = 0,
        scale: str = "relative",
        opacity: float = 0.6,
    ) -> io.NodeOutput:
        if len(record.off) < len(record.keys):
            heat = record.of(image).heat(layers, start_at_step, end_at_step, prompt)
        else:
            _log.warning("Attention Map: no image prompt acted in the recorded model, so the map is empty.")
            heat = image.new_zeros(len(image), 1, 1)
        drawn, large = draw_heat(image, heat, opacity, relative=scale == "relative")
        return io.NodeOutput(drawn, large, ui=ui.PreviewImage(drawn.cpu(), cls=cls))
