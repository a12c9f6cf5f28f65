"""The old nodes whose image acts in the negative branch too, with a boost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from . import fields as f
from .apply_nodes import IPAdapterAdvanced


class IPAdapterPreciseStyleTransfer(IPAdapterAdvanced):
    TITLE = "IPAdapter Precise Style Transfer"
    REPLACED_BY = "Apply IP Adapter with weight type style transfer precise"
    _BOOST: ClassVar[tuple[str, float]] = ("style_boost", 1.0)

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.image("image"),
            f.number("weight", 1.0, -1, 5),
            f.number(*cls._BOOST, -5, 5),
            f.combine(),
            *f.window(),
            f.scaling(),
            *f.negative_and_mask(),
        ]


class IPAdapterPreciseStyleTransferBatch(IPAdapterPreciseStyleTransfer):
    TITLE = "IPAdapter Precise Style Transfer Batch"
    UNFOLD = True


class IPAdapterPreciseComposition(IPAdapterPreciseStyleTransfer):
    TITLE = "IPAdapter Precise Composition"
    REPLACED_BY = "Apply IP Adapter with weight type composition precise"
    _BOOST = ("composition_boost", 0.0)


class IPAdapterPreciseCompositionBatch(IPAdapterPreciseComposition):
    TITLE = "IPAdapter Precise Composition Batch"
    UNFOLD = True


NODES = [
    IPAdapterPreciseStyleTransfer,
    IPAdapterPreciseStyleTransferBatch,
    IPAdapterPreciseComposition,
    IPAdapterPreciseCompositionBatch,
]
