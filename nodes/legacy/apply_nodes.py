"""The old nodes that apply an image prompt. All are one function with other inputs, as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from . import fields as f
from .execute import OldPrompt, apply_old
from .old_node import OldNode, Params
from .wires import open_pipeline


class IPAdapter(OldNode):
    TITLE = "IPAdapter"
    REPLACED_BY = "Image Prompt"
    _TYPES: ClassVar[dict[str, str]] = {"prompt is more important": "ease out", "style transfer": "style transfer"}

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 3),
            *f.window(),
            f.choice("weight_type", ["standard", "prompt is more important", "style transfer"]),
            f.wire(io.Mask, "attn_mask", optional=True),
        ]

    @classmethod
    def apply_ipadapter(
        cls,
        model: Any,
        ipadapter: Any,
        image: Any,
        weight: Any,
        start_at: float,
        end_at: float,
        weight_type: str,
        attn_mask: Any = None,
    ) -> tuple[Any, ...]:
        pipeline = open_pipeline(ipadapter, needs_pipeline=True)
        weight_type = "style transfer" if weight_type.startswith("style") else cls._TYPES.get(weight_type, "linear")
        prompt = OldPrompt(
            image=image, weight=weight, weight_type=weight_type, start_at=start_at, end_at=end_at, attn_mask=attn_mask
        )
        return apply_old(model, pipeline, cls.TITLE, prompt)


class IPAdapterAdvanced(OldNode):
    TITLE = "IPAdapter Advanced"
    UNFOLD: ClassVar[bool] = False  # image i is for latent i

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.weight_type(),
            f.combine(),
            *f.window(),
            f.scaling(),
            *f.negative_and_mask(),
        ]

    @classmethod
    def apply_ipadapter(
        cls,
        model: Any,
        ipadapter: Any,
        start_at: Any = 0.0,
        end_at: Any = 1.0,
        weight: Any = 1.0,
        weight_style: Any = 1.0,
        weight_composition: Any = 1.0,
        expand_style: bool = False,
        weight_type: Any = "linear",
        combine_embeds: str = "concat",
        weight_faceidv2: float | None = None,
        image: Any = None,
        image_style: Any = None,
        image_composition: Any = None,
        image_negative: Any = None,
        clip_vision: Any = None,
        attn_mask: Any = None,
        insightface: Any = None,
        embeds_scaling: str = "V only",
        layer_weights: str | None = None,
        ipadapter_params: dict[str, list[Any]] | None = None,
        encode_batch_size: int = 0,
        style_boost: float | None = None,
        composition_boost: float | None = None,
        enhance_tiles: int = 1,
        enhance_ratio: float = 1.0,
        weight_kolors: float = 1.0,
    ) -> tuple[Any, ...]:
        pipeline = open_pipeline(ipadapter, clip_vision=clip_vision, insightface=insightface)
        composition = image_composition
        if image_style is not None:
            image, weight = image_style, weight_style
            composition = image_style if composition is None else composition
            weight_type = "strong style and composition" if expand_style else "style and composition"
        common = {
            "image_composition": composition,
            "image_negative": image_negative,
            "weight_composition": weight_composition,
            "weight_faceidv2": weight_faceidv2,
            "combine_embeds": combine_embeds,
            "unfold": cls.UNFOLD,
            "embeds_scaling": embeds_scaling,
            "layer_weights": layer_weights,
            "encode_batch_size": encode_batch_size,
            "style_boost": style_boost,
            "composition_boost": composition_boost,
            "enhance_tiles": enhance_tiles,
            "enhance_ratio": enhance_ratio,
            "weight_kolors": weight_kolors,
        }
        each = {"weight_type": weight_type, "start_at": start_at, "end_at": end_at, "attn_mask": attn_mask}
        images, weights = (image if isinstance(image, list) else [image]), [weight]
        if ipadapter_params is not None:
            each = {name: ipadapter_params[name] for name in each}
            images, weights = ipadapter_params["image"], ipadapter_params["weight"]
        prompts = [
            OldPrompt(
                image=one,
                weight=weights[index],
                **{name: value[index] if isinstance(value, list) else value for name, value in each.items()},
                **common,
            )
            for index, one in enumerate(images)
            if one is not None
        ]
        return apply_old(model, pipeline, cls.TITLE, *prompts)


class IPAdapterBatch(IPAdapterAdvanced):
    TITLE = "IPAdapter Batch (Adv.)"
    UNFOLD = True

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.weight_type(),
            *f.window(),
            f.scaling(),
            f.encode_batch_size(),
            *f.negative_and_mask(),
        ]


class IPAdapterStyleComposition(IPAdapterAdvanced):
    TITLE = "IPAdapter Style & Composition SDXL"
    REPLACED_BY = "two of Apply IP Adapter, one for style and one for composition"
    _COMBINES: ClassVar[bool] = True

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image_style"),
            f.image("image_composition"),
            f.number("weight_style", 1.0, -1, 5),
            f.number("weight_composition", 1.0, -1, 5),
            io.Boolean.Input("expand_style", default=False, tooltip=f.tip("expand_style")),
            *([f.combine("average")] if cls._COMBINES else []),
            *f.window(),
            f.scaling(),
            *f.negative_and_mask(),
        ]


class IPAdapterStyleCompositionBatch(IPAdapterStyleComposition):
    TITLE = "IPAdapter Style & Composition Batch SDXL"
    UNFOLD = True
    _COMBINES = False


class IPAdapterMS(IPAdapterAdvanced):
    TITLE = "IPAdapter Mad Scientist"
    REPLACED_BY = "Layer Weights with Apply IP Adapter"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.number("weight_faceidv2", 1.0, -1, 5.0),
            f.weight_type(),
            f.combine(),
            *f.window(),
            f.scaling(),
            io.String.Input("layer_weights", default="", multiline=True, tooltip=f.tip("layer_weights")),
            *f.negative_and_mask(faces=True),
        ]


class IPAdapterClipVisionEnhancer(IPAdapterAdvanced):
    TITLE = "IPAdapter ClipVision Enhancer"
    REPLACED_BY = "Encode Image Prompt with tiles"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.weight_type(),
            f.combine(),
            *f.window(),
            f.scaling(),
            f.whole("enhance_tiles", 2, 1, 16),
            f.number("enhance_ratio", 1.0, 0.0, 1.0),
            *f.negative_and_mask(),
        ]


class IPAdapterClipVisionEnhancerBatch(IPAdapterClipVisionEnhancer):
    TITLE = "IPAdapter ClipVision Enhancer Batch"
    UNFOLD = True

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.weight_type(),
            *f.window(),
            f.scaling(),
            f.whole("enhance_tiles", 2, 1, 16),
            f.number("enhance_ratio", 0.5, 0.0, 1.0),
            f.encode_batch_size(),
            *f.negative_and_mask(),
        ]


class IPAdapterFromParams(IPAdapterAdvanced):
    TITLE = "IPAdapter from Params"
    REPLACED_BY = "Image Prompt Regions"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.wire(Params, "ipadapter_params"),
            f.combine(),
            f.scaling(),
            f.image("image_negative", optional=True),
            f.wire(io.ClipVision, "clip_vision", optional=True),
        ]


NODES = [
    IPAdapter,
    IPAdapterAdvanced,
    IPAdapterBatch,
    IPAdapterStyleComposition,
    IPAdapterStyleCompositionBatch,
    IPAdapterMS,
    IPAdapterClipVisionEnhancer,
    IPAdapterClipVisionEnhancerBatch,
    IPAdapterFromParams,
]
