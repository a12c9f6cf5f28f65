"""The old FaceID nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from . import fields as f
from .apply_nodes import IPAdapterAdvanced


class IPAdapterFaceID(IPAdapterAdvanced):
    TITLE = "IPAdapter FaceID"
    REPLACED_BY = "Encode Face Prompt with Apply IP Adapter"
    _KOLORS: ClassVar[bool] = False

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 3),
            f.number("weight_faceidv2", 1.0, -1, 5.0),
            *([f.number("weight_kolors", 1.0, -1, 5.0)] if cls._KOLORS else []),
            f.weight_type(),
            f.combine(),
            *f.window(),
            f.scaling(),
            *f.negative_and_mask(faces=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Model.Output(display_name="MODEL"), io.Image.Output(display_name="face_image")]


class IPAdapterFaceIDKolors(IPAdapterFaceID):
    TITLE = "IPAdapter FaceID Kolors"
    _KOLORS = True


class IPAAdapterFaceIDBatch(IPAdapterFaceID):
    TITLE = "IPAdapter FaceID Batch"
    UNFOLD = True


NODES = [IPAdapterFaceID, IPAdapterFaceIDKolors, IPAAdapterFaceIDBatch]
