"""IP-Adapter as a library: adapter files, projectors and the image attention. Needs torch and safetensors only."""

from .adapter import IPAdapter, adapter_from_checkpoint, export_state, load_adapter, save_adapter
from .application import AdapterApplication
from .attention import SCALINGS, KeyValue, Scaling
from .build import build_projector
from .checkpoint import AdapterCheckpoint, checkpoint_from_state, read_checkpoint
from .compatible import check_compatible, context_tokens, is_kolors_unet
from .errors import AdapterError
from .heat import draw_heat, image_share
from .infer import infer_spec, shortcut_hint
from .layer_groups import LAYER_GROUPS, LayerFactors, group_factors, group_indices, parse_factors
from .layers import Site, cross_attention_sites, diffusers_sites, init_from_unet
from .layouts import looks_like
from .lora import LoraLayers
from .masks import resize_mask
from .metadata import (
    METADATA_BASE_FAMILY,
    METADATA_DIM_HEAD,
    METADATA_ENCODER,
    METADATA_KIND,
    METADATA_NEGATIVE,
    METADATA_NUM_TOKENS,
    METADATA_RESOLUTION,
    METADATA_SHORTCUT,
    spec_metadata,
)
from .rows import pipeline_rows
from .schedule import WeightSchedule, step_at
from .spec import FAMILIES, FAMILY_NAMES, AdapterSpec, Feature, Kind, family_of, new_spec, with_shortcut
from .tensors import TensorMap
from .unet import inject
from .weight_types import WEIGHT_TYPES, LayerWeight, WeightLayout, layer_weights, parse_weight_type, weight_layout

__all__ = [
    "FAMILIES",
    "FAMILY_NAMES",
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
    "WEIGHT_TYPES",
    "AdapterApplication",
    "AdapterCheckpoint",
    "AdapterError",
    "AdapterSpec",
    "Feature",
    "IPAdapter",
    "KeyValue",
    "Kind",
    "LayerFactors",
    "LayerWeight",
    "LoraLayers",
    "Scaling",
    "Site",
    "TensorMap",
    "WeightLayout",
    "WeightSchedule",
    "adapter_from_checkpoint",
    "build_projector",
    "check_compatible",
    "checkpoint_from_state",
    "context_tokens",
    "cross_attention_sites",
    "diffusers_sites",
    "draw_heat",
    "export_state",
    "family_of",
    "group_factors",
    "group_indices",
    "image_share",
    "infer_spec",
    "init_from_unet",
    "inject",
    "is_kolors_unet",
    "layer_weights",
    "load_adapter",
    "looks_like",
    "new_spec",
    "parse_factors",
    "parse_weight_type",
    "pipeline_rows",
    "read_checkpoint",
    "resize_mask",
    "save_adapter",
    "shortcut_hint",
    "spec_metadata",
    "step_at",
    "weight_layout",
    "with_shortcut",
]
