"""In every layer: the text attention as before, plus the attention to the image tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import comfy.ldm.modules.attention
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ipadapter_core import AdapterError
from ..ipadapter_core.attention import attend_to_heads
from .application import Application, Step, step_of
from .record import Record
from .run import Options, Place

Replacement = Callable[[Tensor, Tensor, Tensor, Options], Tensor]


@dataclass(frozen=True, eq=False)
class SitePatch:
    """The patch of one cross-attention layer (ComfyUI's `attn2_replace`) for one application; immutable.

    `previous`: the earlier patch of this layer, from any pack; None is ComfyUI's own attention. `record`: where to
    record the attention, for an attention map.
    """

    application: Application
    place: Place
    previous: Replacement | None = None
    record: Record | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """query [B, N, C], text key and value [B, T, C] -> [B, N, C], before `to_out`."""
        text = (self.previous or text_attention)(query, key, value, options)
        if self.record is not None and not isinstance(self.previous, SitePatch):
            self.record.add(self.place, "", text, options)
        step = step_of(self.application, options, query)
        if not step.active:
            return text
        term, gate = self.image_term(query, step, options)
        if self.record is not None:
            gated = term if gate is None else term * gate
            self.record.add(self.place, self.application.key, gated, options)
        return text + term if gate is None else torch.addcmul(text, term, gate)

    def recorded(self, record: Record) -> SitePatch:
        """A copy of this patch, and of those of ours below it, that records."""
        previous = self.previous.recorded(record) if isinstance(self.previous, SitePatch) else self.previous
        return replace(self, previous=previous, record=record)

    def image_term(self, query: Tensor, step: Step, options: Options) -> tuple[Tensor, Tensor | None]:
        """The attention of query [B, N, C] to the image tokens of each row, and its factor [B, N, 1] or None."""
        upcast = options.get("attn_precision") == torch.float32
        key, value, gate = step.of(self.place, options, query)
        attend = _attend_in_fp32 if upcast else F.scaled_dot_product_attention
        return attend_to_heads(query, key, value, attend=attend), gate

    def to(self, target: Any, *_: Any, **__: Any) -> SitePatch:
        """ComfyUI moves patches to the device of the model. Ours have no tensors; those of another pack may."""
        previous: Any = self.previous
        previous = previous.to(target) if hasattr(previous, "to") else previous
        return self if previous is self.previous else replace(self, previous=previous)

    def models(self) -> list[Any]:
        """The model patchers that a patch of another pack needs loaded; ours needs none."""
        previous: Any = self.previous
        return previous.models() if hasattr(previous, "models") else []

    def cleanup(self) -> None:
        """After sampling: passed on to a patch of another pack."""
        previous: Any = self.previous
        if hasattr(previous, "cleanup"):
            previous.cleanup()

    def add(self, *_: Any, **__: Any) -> None:
        """ComfyUI_IPAdapter_plus adds its own image prompt to the patch that it finds; ours is immutable."""
        refuse_late_patch()

    def __deepcopy__(self, memo: dict[int, Any]) -> SitePatch:
        return self  # ComfyUI before 0.14 deep-copies patches whenever a model is cloned


def refuse_late_patch() -> NoReturn:
    """The error for a patch of another pack after ours, which ComfyUI would not call."""
    raise AdapterError(
        "Another pack (ComfyUI_IPAdapter_plus?) wants to change the attention after Apply IP Adapter. Connect "
        "its nodes before Apply IP Adapter: model loader, its nodes, Apply IP Adapter, sampler."
    )


def text_attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """What CrossAttention itself would have done, with the model's attention override and precision."""
    return comfy.ldm.modules.attention.optimized_attention(
        query,
        key,
        value,
        heads=options["n_heads"],
        attn_precision=options.get("attn_precision"),
        transformer_options=options,
    )


def _attend_in_fp32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)
