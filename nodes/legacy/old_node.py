"""The base class of the old nodes: a V3 node that also has the method of the old class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from ...ipadapter_core.weight_types import WEIGHT_TYPE_ALIASES, parse_weight_type
from ..types import CATEGORY, node_schema
from .inputs import checked
from .setting import mode

IPAdapterWire = io.Custom("IPADAPTER")
Embeds = io.Custom("EMBEDS")
InsightFace = io.Custom("INSIGHTFACE")
Params = io.Custom("IPADAPTER_PARAMS")
WeightsStrategy = io.Custom("WEIGHTS_STRATEGY")


class OldNode(io.ComfyNode):
    """A node of ComfyUI_IPAdapter_plus. `FUNCTION` is the name of its method there, which other packs call on an
    instance of what NODE_CLASS_MAPPINGS has; it returns the same tuple. ComfyUI runs the same method. Its arguments are
    checked either way.

    Subclasses give `TITLE`, `REPLACED_BY` (our own node, for the description), `inputs` and `outputs`. The class has
    the name of the node.
    """

    FUNCTION: ClassVar[str] = "apply_ipadapter"
    TITLE: ClassVar[str] = ""
    REPLACED_BY: ClassVar[str] = "Encode Image Prompt and Apply IP Adapter"
    OUTPUT: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        method = getattr(cls.__dict__.get(cls.FUNCTION), "__func__", None)
        if method is not None and not hasattr(method, "__wrapped__"):  # ComfyUI runs a locked copy of the class
            setattr(cls, cls.FUNCTION, classmethod(checked(method)))

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
    def validate_inputs(cls, weight_type: str | None = None) -> bool | str:
        """Accepts former names of weight types, which ComfyUI's own check of the list would refuse. None: a connected
        input, or a node without a weight type.
        """
        if weight_type is None:
            return True
        choices = [name for entry in cls.inputs() if entry.id == "weight_type" for name in entry.options or ()]
        kinds = {parse_weight_type(choice) for choice in choices}
        former = {name for name, kind in WEIGHT_TYPE_ALIASES.items() if kind in kinds}
        if not choices or weight_type in {*choices, *former}:
            return True
        return f"weight_type is {weight_type!r}. Choose one of: {', '.join(choices)}."

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        results = getattr(cls, cls.FUNCTION)(**inputs)
        return io.NodeOutput(*results[: len(cls.outputs())])
