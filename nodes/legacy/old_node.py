"""What all nodes under an old name have in common: a V3 node that also answers the calls of the old class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from ..types import CATEGORY, node_schema
from .setting import mode

IPAdapterWire = io.Custom("IPADAPTER")
Embeds = io.Custom("EMBEDS")
InsightFace = io.Custom("INSIGHTFACE")
Params = io.Custom("IPADAPTER_PARAMS")
WeightsStrategy = io.Custom("WEIGHTS_STRATEGY")


class OldNode(io.ComfyNode):
    """A node of ComfyUI_IPAdapter_plus. `FUNCTION` is the name of its method there, which other packs call on an
    instance of what NODE_CLASS_MAPPINGS has; it returns the same tuple. ComfyUI runs the same method.

    Subclasses give `TITLE`, `REPLACED_BY` (our own node, for the description), `inputs` and `outputs`. The class has
    the name of the node.
    """

    FUNCTION: ClassVar[str] = "apply_ipadapter"
    TITLE: ClassVar[str] = ""
    REPLACED_BY: ClassVar[str] = "Encode Image Prompt and Apply IP Adapter"
    OUTPUT: ClassVar[bool] = False

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        raise NotImplementedError

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Model.Output()]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id=cls.__name__,
            display_name=cls.TITLE,
            category=f"{CATEGORY}/old names",
            description=f"Of ComfyUI_IPAdapter_plus, for old workflows. In new ones use {cls.REPLACED_BY}.",
            inputs=list(cls.inputs()),
            outputs=list(cls.outputs()),
            is_output_node=cls.OUTPUT,
            is_deprecated=True,
            search_aliases=[],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """The setting of docs/from-ipadapter-plus.md changes results without changing an input."""
        return mode()

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        results = getattr(cls, cls.FUNCTION)(**inputs)
        return io.NodeOutput(*results[: len(cls.outputs())])
