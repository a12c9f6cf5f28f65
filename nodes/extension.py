"""The list of nodes that ComfyUI asks for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyIPAdapter
from .attention_map import ImagePromptAttentionMap, RecordAttentionMap
from .combine import CombineImagePrompts
from .demo import DemoImage, LoadIPAdapterDemo
from .easy import ImagePrompt
from .encode import EncodeImagePrompt
from .face import EncodeFacePrompt
from .face_analysis import LoadFaceAnalysis
from .layer_weights import LayerWeights
from .load import LoadIPAdapter
from .noise_image import NoiseImage
from .regions import ImagePromptRegions
from .save_load import LoadImagePrompt, SaveImagePrompt
from .weight_schedule import WeightSchedule


class IPAdapterKitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ImagePrompt,
            LoadIPAdapter,
            EncodeImagePrompt,
            ApplyIPAdapter,
            LoadFaceAnalysis,
            EncodeFacePrompt,
            LoadIPAdapterDemo,
            DemoImage,
            CombineImagePrompts,
            NoiseImage,
            SaveImagePrompt,
            LoadImagePrompt,
            LayerWeights,
            WeightSchedule,
            ImagePromptRegions,
            RecordAttentionMap,
            ImagePromptAttentionMap,
        ]
