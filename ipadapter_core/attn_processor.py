"""The attention processor that adds image attention to another one, in a diffusers UNet, by duck typing.

The original processor stays in charge. It is called with a view of its attention layer whose `to_q` remembers the
query and whose `to_out` first adds the image attention; so masks, norms, residuals and rescaling are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .application import AdapterApplication
from .attention import image_attention
from .errors import AdapterError
from .masks import level_grid

if TYPE_CHECKING:
    from .unet import Injection

Projection = Callable[[Tensor], Tensor]


class ImageAttnProcessor:
    """Calls the original processor and adds the image attention of every application before `to_out`."""

    def __init__(
        self,
        original: Any,
        injection: Injection,
        applications: Sequence[tuple[AdapterApplication, Injection]],
        id: int,
    ) -> None:
        self.original = original
        self.injection = injection
        self.applications = tuple(applications)
        self.id = id

    def active_applications(self) -> list[tuple[AdapterApplication, Injection]]:
        """Those that are not ejected; fuse_qkv_projections keeps processors beyond that."""
        return [(application, injection) for application, injection in self.applications if injection.active]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        ip_adapter_masks: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if ip_adapter_masks is not None:  # for diffusers' own adapters below this one
            kwargs["ip_adapter_masks"] = ip_adapter_masks
        view = _AttentionView(attn, self)
        if temb is not None:
            kwargs["temb"] = temb
        out = self.original(
            view,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
        if self.id % 2 and not view.used:
            raise AdapterError(
                f"{self.injection!r}: {type(self.original).__name__} does not call both to_q and to_out of its "
                "attention layer, so no image attention can be added. Choose another attention processor before inject."
            )
        return out

    def image_term(self, query: Tensor, heads: int, text: Tensor) -> Tensor | None:
        """The sum of all image attentions for a query [B, N, C], or None. `text`, the text attention [B, N, C], is
        passed to observers.
        """
        if self.id % 2 == 0:
            return None
        total: Tensor | None = None
        for application, injection in self.active_applications():
            weight = application.layer_weight(self.id // 2)
            if application.key_values is None or (not isinstance(weight, Tensor) and weight == 0):
                continue
            if injection.latent_size is None:
                raise AdapterError(
                    f"{injection!r}: the size of the UNet's batch is unknown. Call the UNet itself (`unet(...)`), not "
                    "`unet.forward`."
                )
            key, value = application.layer_key_values(self.id // 2)
            mask = None
            if application.mask is not None:
                mask = application.layer_mask(level_grid(injection.latent_size, query.shape[1]), query)
            term = image_attention(query, key, value, heads, weight=weight, mask=mask)
            if application.observe is not None:
                application.observe(self.id, text, term)
            total = term if total is None else total + term
        return total


class _AttentionView:
    """An attention layer whose four projections are replaced; every other attribute is the layer's own."""

    def __init__(self, attn: Any, processor: ImageAttnProcessor) -> None:
        self._attn = attn
        active = [application for application, _ in processor.active_applications()]
        self._adapted = [(a.lora, a.lora_weight) for a in active if a.lora is not None and a.lora_weight != 0]
        self._id = processor.id
        self._to_q = self._projection(attn.to_q, "to_q")
        self.to_k, self.to_v = self._projection(attn.to_k, "to_k"), self._projection(attn.to_v, "to_v")
        # Not a method of the view: a reference cycle would keep the query until the garbage collector runs.
        self._out = _ImageOut(self._projection(attn.to_out[0], "to_out"), processor, attn.heads)
        self.to_out = [self._out, *attn.to_out[1:]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        self._out.query = self._to_q(hidden_states)
        return self._out.query

    def to_kv(self, hidden_states: Tensor) -> Tensor:
        """After fuse_qkv_projections: keys and values of a cross-attention side by side."""
        return self._projection(self._attn.to_kv, "to_k", "to_v")(hidden_states)

    def to_qkv(self, hidden_states: Tensor) -> Tensor:
        """The same for a self-attention, queries first."""
        return self._projection(self._attn.to_qkv, "to_q", "to_k", "to_v")(hidden_states)

    @property
    def used(self) -> bool:
        """Whether the image attention was added, or could have been."""
        return self._out.used

    def _projection(self, projection: Projection, *parts: str) -> Projection:
        """A projection of the layer, or several side by side, with the LoRA of each adapter."""
        for lora, weight in self._adapted:
            projection = _with_lora(projection, [lora.part(self._id, part) for part in parts], weight)
        return projection


class _ImageOut:
    """The output projection of an `_AttentionView`: adds the image attention of the query first."""

    query: Tensor | None = None
    used: bool = False

    def __init__(self, to_out: Projection, processor: ImageAttnProcessor, heads: int) -> None:
        self._to_out = to_out
        self._processor = processor
        self._heads = heads

    def __call__(self, hidden_states: Tensor) -> Tensor:
        self.used = self.query is not None
        term = None if self.query is None else self._processor.image_term(self.query, self._heads, hidden_states)
        return self._to_out(hidden_states if term is None else hidden_states + term)


def _with_lora(projection: Projection, updates: Sequence[nn.Module], weight: float) -> Projection:
    if len(updates) == 1:
        return lambda x: projection(x) + weight * updates[0](x)
    return lambda x: projection(x) + weight * torch.cat([update(x) for update in updates], dim=-1)
