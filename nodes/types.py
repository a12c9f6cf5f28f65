"""What travels on the wires between the nodes, and how a node describes itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import AdapterSpec, IPAdapter, LoraLayers

IPAdapterModel = io.Custom("IP_ADAPTER_MODEL")
ImagePromptType = io.Custom("IMAGE_PROMPT")

CATEGORY = "image prompt"
SEARCH_ALIASES = ["ip adapter", "ipadapter", "image prompt", "reference image", "style transfer"]
_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def node_schema(**fields: Any) -> io.Schema:
    """An io.Schema of our category; fields that an older ComfyUI does not know are left out (it would refuse them)."""
    fields = {"category": CATEGORY, "search_aliases": SEARCH_ALIASES, **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter under ComfyUI's memory management. `name` is its file's, for messages.

    ComfyUI finds `patcher` and keeps the weights while a prompt that uses them runs. `lora` is kept beside it: its
    weights go to the device with the model that they patch, not with the adapter.
    """

    name: str
    patcher: comfy.model_patcher.ModelPatcher
    lora: LoraLayers | None = None

    @property
    def adapter(self) -> IPAdapter:
        return self.patcher.model

    @property
    def spec(self) -> AdapterSpec:
        return self.adapter.spec

    def on_device(self) -> IPAdapter:
        """The adapter, ready to compute on `patcher.load_device`; ComfyUI may drop it again at any time after."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.adapter


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Image tokens of both branches, [1, T, D] each, on ComfyUI's intermediate device.

    `images` pictures share the T tokens; `weight` multiplies that of the Apply node; `adapter` names the file
    whose projector made them. `has_negative`: `negative` is of pictures that were chosen.
    """

    positive: Tensor
    negative: Tensor
    images: int
    weight: float
    adapter: str
    has_negative: bool = False


def manage(name: str, adapter: IPAdapter) -> LoadedAdapter:
    """Hand an adapter, built with ComfyUI's operations, to ComfyUI's memory management, but for its LoRA."""
    lora, adapter.lora = adapter.lora, None
    # Looked up late: ComfyUI replaces the class at start when it streams weights.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return LoadedAdapter(name, patcher, lora)
