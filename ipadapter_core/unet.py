"""Image attention in a diffusers UNet, by duck typing: inject it, eject it, the UNet is as it was.

The original processors stay in charge. Each is called with a view of its attention layer whose `to_q`
remembers the query and whose `to_out` first adds the image attention; so masks, norms, residuals and
rescaling are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import KeyValue, image_attention
from .errors import AdapterError
from .layers import Site, attention_ids, diffusers_sites, named_modules
from .lora import LORA_PARTS, LoraLayers
from .masks import level_grid, resize_mask

Projection = Callable[[Tensor], Tensor]
Observe = Callable[[int, Tensor, Tensor], None]


@dataclass(eq=False)
class AdapterApplication:
    """One adapter at work in a UNet. Its fields may be set between steps; processors read the current ones.

    `key_values`: per layer in id order, [B, T, C] with B equal to the UNet's batch, 1 (for all rows), or 2:
    [negative, positive], each repeated over half of the batch, in diffusers' order of classifier-free
    guidance. While sampling set it once; while training set it each step, gradients flow through it. None
    adds nothing. `weight`: a number, a tensor of one number per row, or a sequence of numbers with one per
    layer in id order. For another scaling than "V only" pass key_values through `scale_keys_values` first.
    `mask`: [H, W] or [B, H, W]. `lora`: the LoRA of a FaceID adapter, added with `lora_weight` to every
    attention layer. `name` is for errors. `observe(layer_id, text_attention, image_attention)` is called in
    every layer that adds something with what is about to be summed, both [B, N, C] and before `to_out`; the
    image attention is this application's, weight and mask included.
    """

    key_values: Sequence[KeyValue] | None = None
    weight: float | Tensor | Sequence[float] = 1.0
    mask: Tensor | None = None
    lora: LoraLayers | None = None
    lora_weight: float = 1.0
    name: str = "adapter"
    observe: Observe | None = None
    _resized: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[int, int], tuple[Tensor, Tensor]], init=False, repr=False
    )

    def layer_weight(self, index: int) -> float | Tensor:
        """The weight of the layer at `index` (id order)."""
        if isinstance(self.weight, (int, float, Tensor)):
            return self.weight
        return self.weight[index]

    def layer_mask(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """The mask on a layer's grid, [B or 1, N, 1]; each grid is computed once per mask."""
        mask = cast("Tensor", self.mask)
        source, resized = self._resized.get(grid, (None, mask))
        if source is not mask or resized.device != like.device or resized.dtype != like.dtype:
            resized = resize_mask(mask, grid).to(like)
            self._resized[grid] = (mask, resized)
        return resized


class Injection:
    """Image attention that is in a UNet now; leaving the `with` block, or `eject`, takes it out."""

    def __init__(self, unet: nn.Module, applications: Sequence[AdapterApplication]) -> None:
        self.applications = tuple(applications)
        self.latent_size: tuple[int, int] | None = None
        modules = named_modules(unet)
        self._replaced = [
            (modules[name], modules[name].processor, processor)
            for name, processor in _new_processors(unet, modules, self)
        ]
        for attention, _, processor in self._replaced:
            attention.set_processor(processor)
        self._hook = unet.register_forward_pre_hook(self._remember_latent_size, with_kwargs=True)
        self._active = True

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.eject()

    def __repr__(self) -> str:
        return f"Injection({', '.join(application.name for application in self.applications)})"

    def eject(self) -> None:
        """Put back exactly the processors that were there before. A second call does nothing.

        Raises AdapterError, and changes nothing, when something was injected on top and is still there.
        """
        if not self._active:
            return
        for attention, _, processor in self._replaced:
            found = attention.processor
            if found is not processor:
                other = repr(found.injection) if isinstance(found, ImageAttnProcessor) else type(found).__name__
                raise AdapterError(f"{self!r} cannot be ejected: {other} was put on top of it. Eject {other} first.")
        for attention, original, _ in self._replaced:
            attention.set_processor(original)
        self._hook.remove()
        self._active = False

    def _remember_latent_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Any = args[0] if args else kwargs.get("sample")
        if isinstance(sample, Tensor):
            self.latent_size = (sample.shape[-2], sample.shape[-1])


def inject(unet: nn.Module, applications: AdapterApplication | Iterable[AdapterApplication]) -> Injection:
    """Add image attention to a diffusers UNet: `with inject(unet, AdapterApplication(key_values)): ...`.

    Injections nest; they end in the reverse order. Raises AdapterError when an adapter does not fit the UNet.
    """
    listed = [applications] if isinstance(applications, AdapterApplication) else list(applications)
    return Injection(unet, listed)


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
        return self.original(
            view,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )

    def image_term(self, query: Tensor, heads: int, text: Tensor) -> Tensor | None:
        """The sum of all image attentions for a query [B, N, C]; None when nothing is to be added. `text` is the
        text attention [B, N, C], for observers.
        """
        if self.id % 2 == 0:
            return None
        total: Tensor | None = None
        for application, injection in self.applications:
            weight = application.layer_weight(self.id // 2)
            if application.key_values is None or (not isinstance(weight, Tensor) and weight == 0):
                continue
            key, value = (
                _rows(part, query.shape[0], application.name) for part in application.key_values[self.id // 2]
            )
            mask = None if application.mask is None else application.layer_mask(_grid(injection, query), query)
            term = image_attention(query, key, value, heads, weight=weight, mask=mask)
            if application.observe is not None:
                application.observe(self.id, text, term)
            total = term if total is None else total + term
        return total


class _AttentionView:
    """An attention layer as the original processor sees it: everything is the layer's own, but for four
    projections.
    """

    def __init__(self, attn: Any, processor: ImageAttnProcessor) -> None:
        self._attn = attn
        adapted = [
            (a.lora, a.lora_weight) for a, _ in processor.applications if a.lora is not None and a.lora_weight != 0
        ]
        projections: dict[str, Projection] = {part: getattr(attn, part) for part in LORA_PARTS[:3]}
        projections["to_out"] = attn.to_out[0]
        for part in LORA_PARTS:
            for lora, weight in adapted:
                projections[part] = _with_lora(projections[part], lora.part(processor.id, part), weight)
        self._to_q, self.to_k, self.to_v = (projections[part] for part in LORA_PARTS[:3])
        # Not a method of the view: a cycle would keep the query alive until Python's garbage collector runs.
        self._out = _ImageOut(projections["to_out"], processor, attn.heads)
        self.to_out = [self._out, *attn.to_out[1:]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        self._out.query = self._to_q(hidden_states)
        return self._out.query


class _ImageOut:
    """The output projection of an `_AttentionView`: adds the image attention of the query first."""

    query: Tensor | None = None

    def __init__(self, to_out: Projection, processor: ImageAttnProcessor, heads: int) -> None:
        self._to_out = to_out
        self._processor = processor
        self._heads = heads

    def __call__(self, hidden_states: Tensor) -> Tensor:
        term = None if self.query is None else self._processor.image_term(self.query, self._heads, hidden_states)
        return self._to_out(hidden_states if term is None else hidden_states + term)


def _with_lora(projection: Projection, update: nn.Module, weight: float) -> Projection:
    return lambda x: projection(x) + weight * update(x)


def _new_processors(
    unet: nn.Module, modules: dict[str, Any], injection: Injection
) -> list[tuple[str, ImageAttnProcessor]]:
    """The processors to put in, by attention module: cross-attention always, self-attention for a LoRA."""
    sites = diffusers_sites(unet)
    for application in injection.applications:
        _check_fit(application, sites)
    lora = any(application.lora is not None for application in injection.applications)
    new: list[tuple[str, ImageAttnProcessor]] = []
    for name, id in attention_ids(cast("Any", unet).attn_processors).items():
        if id % 2 == 0 and not lora:
            continue
        attention_name = name.removesuffix(".processor")
        below = modules[attention_name].processor
        applications = [(application, injection) for application in injection.applications]
        if isinstance(below, ImageAttnProcessor):
            # One processor with all applications, so that every image attention sees every LoRA's query.
            below, applications = below.original, [*below.applications, *applications]
        new.append((attention_name, ImageAttnProcessor(below, injection, applications, id)))
    return new


def _check_fit(application: AdapterApplication, sites: Sequence[Site]) -> None:
    name = application.name
    if application.key_values is not None:
        widths = [pair.key.shape[-1] for pair in application.key_values]
        expected = [site.width for site in sites]
        if widths != expected:
            at = next((i for i, (a, b) in enumerate(zip(widths, expected, strict=False)) if a != b), None)
            detail = f"layer {2 * at + 1} is {widths[at]} wide, the UNet's {expected[at]}" if at is not None else ""
            raise AdapterError(
                f"{name}: has {len(widths)} layers, the UNet has {len(expected)}{'; ' + detail if detail else ''}. "
                "Use an adapter for this base model."
            )
    if isinstance(application.weight, Sequence) and len(application.weight) != len(sites):
        raise AdapterError(
            f"{name}: {len(application.weight)} weights for {len(sites)} layers. Pass one weight per layer, or one "
            "number."
        )
    if application.lora is not None and len(list(application.lora.children())) != 2 * len(sites):
        raise AdapterError(
            f"{name}: its LoRA has {len(list(application.lora.children()))} layers, the UNet {2 * len(sites)}. Use an "
            "adapter for this base model."
        )


def _rows(x: Tensor, batch: int, name: str) -> Tensor:
    """Bring K or V to the UNet's batch; one row stays one row and is broadcast by the attention."""
    if x.shape[0] in (1, batch):
        return x
    if x.shape[0] == 2 and batch % 2 == 0:
        return torch.repeat_interleave(x, batch // 2, dim=0)
    raise AdapterError(
        f"{name}: {x.shape[0]} rows of image keys for a UNet batch of {batch}. Pass 1, 2 (negative, positive) or "
        f"{batch}."
    )


def _grid(injection: Injection, query: Tensor) -> tuple[int, int]:
    if injection.latent_size is None:
        raise AdapterError("A mask needs the latent's size: call the UNet itself (`unet(...)`), not `unet.forward`.")
    return level_grid(injection.latent_size, query.shape[1])
