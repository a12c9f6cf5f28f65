"""Image attention in a diffusers UNet: inject it, and eject it to get the UNet back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn

from .application import AdapterApplication
from .attn_processor import ImageAttnProcessor
from .errors import AdapterError
from .layers import attention_ids, diffusers_sites, named_modules, unwrap
from .rows import take_rows


class Injection:
    """Image attention in a UNet; leaving the `with` block, or `eject`, takes it out."""

    def __init__(self, unet: nn.Module, applications: Sequence[AdapterApplication]) -> None:
        self.applications = tuple(applications)
        self.latent_size: tuple[int, int] | None = None
        self.active = True
        self._rows: list[int] | None = None
        self._rows_tensor: Tensor | None = None
        self._unet = unet = unwrap(unet)
        self._layer_dims = [site.dim for site in diffusers_sites(unet)]
        modules = named_modules(unet)
        self._replaced = [
            (modules[name], modules[name].processor, processor)
            for name, processor in _new_processors(unet, modules, self)
        ]
        for attention, _, processor in self._replaced:
            attention.set_processor(processor)
        self._hook = unet.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __enter__(self) -> Injection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.eject()

    def __repr__(self) -> str:
        return f"Injection({', '.join(application.name for application in self.applications)})"

    def eject(self) -> None:
        """Put back the processors from before; those that have replaced ours since then stay. A second call does
        nothing.

        Raises AdapterError, and changes nothing, when another injection on top of it was not ejected yet.
        """
        if not self.active:
            return
        for attention, _, processor in self._replaced:
            found = attention.processor
            if found is not processor and self._is_in(found):
                raise AdapterError(
                    f"{self!r} cannot be ejected: {found.injection!r} was put on top of it. Eject {found.injection!r} "
                    "first."
                )
        for attention, original, processor in self._replaced:
            if attention.processor is processor:
                attention.set_processor(original)
        self._hook.remove()
        self.active = False
        self._forget_saved_processors()

    def _is_in(self, processor: Any) -> bool:
        return isinstance(processor, ImageAttnProcessor) and any(i is self for _, i in processor.applications)

    def _forget_saved_processors(self) -> None:
        """fuse_qkv_projections keeps the processors that it replaced, for unfuse_qkv_projections to put back."""
        saved = cast("dict[str, Any] | None", getattr(self._unet, "original_attn_processors", None)) or {}
        for name, processor in saved.items():
            if isinstance(processor, ImageAttnProcessor) and not processor.active_applications():
                saved[name] = processor.original

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check this call and note what its layers need: the latent's size and the rows of the batch."""
        for attention, _, processor in self._replaced:
            found = attention.processor
            if found is not processor and not self._is_in(found):
                raise AdapterError(
                    f"{self!r}: {type(found).__name__} took the place of its attention processors, which turns it off. "
                    "Attention slicing, xformers, fuse_qkv_projections, load_ip_adapter, set_attn_processor and the "
                    "like go before inject."
                )
        sample = cast("Tensor", args[0] if args else kwargs["sample"])
        self.latent_size = (sample.shape[-2], sample.shape[-1])
        rows, kwargs = take_rows(kwargs)
        if rows is not None and len(rows) != len(sample):
            raise AdapterError(
                f"{self!r}: the pipeline has image prompts for {len(rows)} rows, its batch has {len(sample)}. Leave "
                "guidance on or off for the whole run; for pipelines that build their batch otherwise, set "
                "AdapterApplication.rows."
            )
        frames = sample.shape[2] if sample.ndim == 5 else 1  # in the attention, each frame of a video is a row
        if rows is not self._rows_tensor:  # once a run: a pipeline passes the same tensor in every step
            self._rows_tensor, self._rows = rows, None if rows is None else _row_list(rows, frames)
        for application in self.applications:
            application.check(self._layer_dims, again=False)
            application.start_call(len(sample) * frames, self._rows)
        return args, kwargs


def inject(unet: nn.Module, applications: AdapterApplication | Iterable[AdapterApplication]) -> Injection:
    """Add image attention to a diffusers UNet: `with inject(unet, AdapterApplication(key_values)): ...`.

    Injections nest; they end in the reverse order. Raises AdapterError when an adapter does not fit the UNet.
    """
    listed = [applications] if isinstance(applications, AdapterApplication) else list(applications)
    return Injection(unet, listed)


def _new_processors(
    unet: nn.Module, modules: dict[str, Any], injection: Injection
) -> list[tuple[str, ImageAttnProcessor]]:
    """The processors to put in, by attention module: cross-attention always, self-attention for a LoRA."""
    sites = diffusers_sites(unet)
    for application in injection.applications:
        application.check([site.dim for site in sites])
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


def _row_list(rows: Tensor, frames: int) -> list[int]:
    numbers = cast("list[int]", rows.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
    return [int(row) for row in numbers for _ in range(frames)]
