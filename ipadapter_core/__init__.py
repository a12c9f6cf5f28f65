"""IP-Adapter as a library: files, projectors, layer tables and the image attention. torch and safetensors
only.
"""

from .adapter import (
    IPAdapter,
    adapter_from_checkpoint,
    export_state,
    init_adapter,
    load_adapter,
    save_adapter,
)
from .application import AdapterApplication
from .attention import SCALINGS, Attend, KeyValue, Scaling, image_attention, scale_keys_values
from .attn_processor import ImageAttnProcessor
from .build import build_layers, build_lora, build_projector, load_layers, load_projector
from .checkpoint import AdapterCheckpoint, checkpoint_from_state, read_checkpoint
from .compatible import check_compatible, context_tokens, is_kolors_unet
from .errors import AdapterError
from .heat import colour_heat, draw_heat, image_share
from .infer import infer_spec, shortcut_hint
from .layer_groups import LAYER_GROUPS, LayerFactors, group_factors, group_indices, parse_factors
from .layers import (
    ImageKeyValueLayers,
    Layer,
    Site,
    attention_ids,
    comfy_block_ids,
    cross_attention_sites,
    diffusers_sites,
    init_from_unet,
    layer_keys_values,
    layer_table,
)
from .layouts import looks_like
from .lora import LoraLayers
from .masks import level_grid, resize_mask
from .operations import Operations
from .projectors import FaceIDPlusProjection, FaceIDProjection, FullProjection, ImageProjection, Resampler
from .rows import pipeline_rows
from .schedule import TIMINGS, WeightSchedule, parse_weights, step_at
from .spec import (
    FAMILIES,
    FAMILY_NAMES,
    KINDS,
    METADATA_BASE_FAMILY,
    METADATA_DIM_HEAD,
    METADATA_ENCODER,
    METADATA_KIND,
    METADATA_NEGATIVE,
    METADATA_NUM_TOKENS,
    METADATA_RESOLUTION,
    METADATA_SHORTCUT,
    AdapterSpec,
    Feature,
    Kind,
    family_of,
    new_spec,
    spec_metadata,
    with_shortcut,
)
from .tensors import TensorMap
from .unet import Injection, inject
from .weight_types import (
    WEIGHT_LAYOUTS,
    WEIGHT_TYPE_ALIASES,
    WEIGHT_TYPES,
    LayerWeight,
    WeightLayout,
    WeightType,
    layer_weights,
    parse_weight_type,
    weight_layout,
)

__all__ = [
    "FAMILIES",
    "FAMILY_NAMES",
    "KINDS",
    "LAYER_GROUPS",
    "METADATA_BASE_FAMILY",
    "METADATA_DIM_HEAD",
    "METADATA_ENCODER",
    "METADATA_KIND",
    "METADATA_NEGATIVE",
    "METADATA_NUM_TOKENS",
    "METADATA_RESOLUTION",
    "METADATA_SHORTCUT",
    "SCALINGS",
    "TIMINGS",
    "WEIGHT_LAYOUTS",
    "WEIGHT_TYPES",
    "WEIGHT_TYPE_ALIASES",
    "AdapterApplication",
    "AdapterCheckpoint",
    "AdapterError",
    "AdapterSpec",
    "Attend",
    "FaceIDPlusProjection",
    "FaceIDProjection",
    "Feature",
    "FullProjection",
    "IPAdapter",
    "ImageAttnProcessor",
    "ImageKeyValueLayers",
    "ImageProjection",
    "Injection",
    "KeyValue",
    "Kind",
    "Layer",
    "LayerFactors",
    "LayerWeight",
    "LoraLayers",
    "Operations",
    "Resampler",
    "Scaling",
    "Site",
    "TensorMap",
    "WeightLayout",
    "WeightSchedule",
    "WeightType",
    "adapter_from_checkpoint",
    "attention_ids",
    "build_layers",
    "build_lora",
    "build_projector",
    "check_compatible",
    "checkpoint_from_state",
    "colour_heat",
    "comfy_block_ids",
    "context_tokens",
    "cross_attention_sites",
    "diffusers_sites",
    "draw_heat",
    "export_state",
    "family_of",
    "group_factors",
    "group_indices",
    "image_attention",
    "image_share",
    "infer_spec",
    "init_adapter",
    "init_from_unet",
    "inject",
    "is_kolors_unet",
    "layer_keys_values",
    "layer_table",
    "layer_weights",
    "level_grid",
    "load_adapter",
    "load_layers",
    "load_projector",
    "looks_like",
    "new_spec",
    "parse_factors",
    "parse_weight_type",
    "parse_weights",
    "pipeline_rows",
    "read_checkpoint",
    "resize_mask",
    "save_adapter",
    "scale_keys_values",
    "shortcut_hint",
    "spec_metadata",
    "step_at",
    "weight_layout",
    "with_shortcut",
]
