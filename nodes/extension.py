"""The list of nodes that ComfyUI asks for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyIPAdapter
from .demo import LoadIPAdapterDemo
from .encode import EncodeImagePrompt
from .face import EncodeFacePrompt
from .face_analysis import LoadFaceAnalysis
from .legacy.register import old_nodes
from .load import LoadIPAdapter


class IPAdapterKitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadIPAdapter,
            EncodeImagePrompt,
            ApplyIPAdapter,
            LoadIPAdapterDemo,
            LoadFaceAnalysis,
            EncodeFacePrompt,
            *old_nodes(),
        ]
