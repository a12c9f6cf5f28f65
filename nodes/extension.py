"""The list of nodes that ComfyUI asks for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyIPAdapter
from .demo import DemoImage, LoadIPAdapterDemo
from .easy import ImagePrompt
from .encode import EncodeImagePrompt
from .face import EncodeFacePrompt
from .face_analysis import LoadFaceAnalysis
from .legacy.register import old_nodes
from .load import LoadIPAdapter


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
            *old_nodes(),
        ]
