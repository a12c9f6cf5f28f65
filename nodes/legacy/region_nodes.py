"""The old nodes around regions: parameters of several image prompts on one wire, as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import node_helpers
from comfy_api.latest import io

from . import fields as f
from .old_node import OldNode, Params

_NAMES = ("image", "attn_mask", "weight", "weight_type", "start_at", "end_at")


class IPAdapterRegionalConditioning(OldNode):
    TITLE = "IPAdapter Regional Conditioning"
    REPLACED_BY = "Image Prompt Regions"
    FUNCTION = "conditioning"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.image("image"),
            f.number("image_weight", 1.0, -1.0, 3.0),
            f.number("prompt_weight", 1.0, 0.0, 10.0),
            f.weight_type(),
            *f.window(),
            f.wire(io.Mask, "mask", optional=True),
            f.wire(io.Conditioning, "positive", optional=True),
            f.wire(io.Conditioning, "negative", optional=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [
            Params.Output(display_name="IPADAPTER_PARAMS"),
            io.Conditioning.Output(display_name="POSITIVE"),
            io.Conditioning.Output(display_name="NEGATIVE"),
        ]

    @classmethod
    def conditioning(
        cls,
        image: Any,
        image_weight: float,
        prompt_weight: float,
        weight_type: str,
        start_at: float,
        end_at: float,
        mask: Any = None,
        positive: Any = None,
        negative: Any = None,
    ) -> tuple[Any, ...]:
        if mask is not None:
            values = {"mask": mask, "set_area_to_bounds": False, "mask_strength": prompt_weight}
            positive, negative = (
                cond if cond is None else node_helpers.conditioning_set_values(cond, values)
                for cond in (positive, negative)
            )
        values = (image, mask, image_weight, weight_type, start_at, end_at)
        return {name: [value] for name, value in zip(_NAMES, values, strict=True)}, positive, negative


class IPAdapterCombineParams(OldNode):
    TITLE = "IPAdapter Combine Params"
    REPLACED_BY = "Image Prompt Regions"
    FUNCTION = "combine"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.wire(Params, f"params_{index}", optional=index > 2) for index in range(1, 6)]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [Params.Output()]

    @classmethod
    def combine(
        cls, params_1: Any, params_2: Any, params_3: Any = None, params_4: Any = None, params_5: Any = None
    ) -> tuple[dict[str, list[Any]]]:
        given = [params for params in (params_1, params_2, params_3, params_4, params_5) if params is not None]
        return ({name: [value for params in given for value in params[name]] for name in _NAMES},)


NODES = [IPAdapterRegionalConditioning, IPAdapterCombineParams]
