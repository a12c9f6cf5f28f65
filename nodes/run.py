"""What is known of a run of the sampler, and of one call of the model in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, step_at
from ..ipadapter_core.branches import resolve_branches, rows_each, source_rows

RUN = "ip_adapter_kit.run"  # the key of the Run in transformer_options
REGION = "ip_adapter_kit.region"  # marks the conds of Image Prompt Regions
_CACHE_SIZE = 4  # calls: positive and negative in calls of their own, at two sizes

Options = dict[str, Any]  # ComfyUI's transformer_options, or model_options
Grid = tuple[int, int]  # (height, width)
Part = tuple[int, tuple[int, ...]]  # a dimension of the latent, and the indices in it
Place = tuple[str, int, int]  # ComfyUI's key of an attention layer, such as ("input", 1, 0)
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sampler over `sigmas`, on a batch of `images` latents of `size`; made by `start_run`.

    By the uuid of a cond: `names` in the guider, `corners` (top, left) of conds with an area. `cache` has what was
    computed in this run.
    """

    names: Mapping[Hashable, frozenset[str]] = field(default_factory=dict)
    size: Grid | None = None
    corners: Mapping[Hashable, Grid] = field(default_factory=dict)
    images: int = 0
    sigmas: Tensor | None = None
    cache: dict[Hashable, dict[Hashable, Any]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def remember(self, name: Hashable, key: Hashable, make: Callable[[], _T], size: int = _CACHE_SIZE) -> _T:
        """The result of `make()` for this key, computed once per run; the last `size` keys of each name are cached."""
        return remember(self.cache.setdefault(name, {}), key, make, size)

    @cached_property
    def sigma_list(self) -> tuple[float, ...]:
        """`sigmas` on the CPU, read once: they may be on the device."""
        return () if self.sigmas is None else tuple(self.sigmas.tolist())


@dataclass(frozen=True)
class Call:
    """One call of the model with a batch of `rows` latents of `size`; equal for calls that are alike.

    The batch has one chunk for each cond: `chunks` has their indices in the guider's list, `branches` POSITIVE or
    NEGATIVE, `corners` where their area begins in the latent of size `whole` (None: no area). `frames` are the images
    of the whole batch that each chunk has; not `known` if another node calls the model with some of them and does not
    say which. `copies`: nodes that sample in tiles put several tiles into one batch, all chunks of a tile together.
    `part`: the rows (dimension 2) or columns (3) of the latent that a spatial context window has.
    """

    rows: int
    size: Grid
    whole: Grid
    chunks: tuple[int, ...]
    branches: tuple[int, ...]
    corners: tuple[Grid | None, ...]
    frames: tuple[int, ...]
    device: torch.device
    known: bool = True
    copies: int = 1
    part: Part | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the place of this call in the whole latent is known."""
        areas = any(corner is not None for corner in self.corners)
        return not areas if self.part is not None else areas or self.size == self.whole

    def sources(self, options: Options, batch: int) -> list[int]:
        """The row of this call for each row of the batch in a layer, where regional prompts may have enlarged it."""
        declared = options.get("cond_or_uncond_couple") or options.get("cond_or_uncond") or (0,)
        return source_rows(declared, self.chunks, self.rows, batch, self.copies)


def remember(cache: dict[Hashable, _T], key: Hashable, make: Callable[[], _T], size: int) -> _T:
    """The result of `make()` for this key; the last `size` keys are cached."""
    if key not in cache:
        cache[key] = make()
        for old in list(cache)[:-size]:
            cache.pop(old, None)
    return cache[key]


def run_of(options: Options) -> Run:
    """The run; an empty one when a host calls the model without the wrapper that starts it."""
    run = options.get(RUN)
    return run if isinstance(run, Run) else Run()


def read_call(options: Options, x: Tensor, size: Grid | None = None, context: Tensor | None = None) -> Call:
    """The call with these transformer options, this input [B, C, H, W] and this text `context` [B, T, C]; in a layer
    with its query [B, N, C] and the `size` of the latent.

    Raises AdapterError when the batch does not divide into the conds, and when the order of its rows is not known.
    """
    run = run_of(options)
    chunks = tuple(options.get("cond_or_uncond") or (0,))
    uuids = options.get("uuids") or ()
    corners = run.corners if len(uuids) == len(chunks) else {}
    size = size or grid_of(x.shape)
    whole = run.size or size
    if size[0] >= whole[0] and size[1] >= whole[1]:
        whole = size  # a sampler that enlarges the latent while it samples
    each = rows_each(len(chunks), x.shape[0])
    frames = _frames(options, run.images or each)
    copies = 1
    if (known := each % len(frames) == 0) and each > len(frames):
        copies = each // len(frames)
        if not _chunks_together(context, copies, x.shape[0], len(chunks), in_parts=size != whole):
            frames, copies = frames * copies, 1
    return Call(
        rows=x.shape[0],
        size=size,
        whole=whole,
        chunks=chunks,
        branches=resolve_branches(chunks, uuids, run.names),
        corners=tuple(corners.get(uuid) for uuid in uuids) if corners else (None,) * len(chunks),
        frames=frames if known else tuple(range(each)),
        device=x.device,
        known=known,
        copies=copies,
        part=_part(options, size, whole),
    )


def sigma_of(options: Options, t: Tensor) -> float:
    """The sigma of this call: one host sync per step, shared by all that need it. It is not put into the options,
    where torch.compile would make a graph for each number.
    """
    return run_of(options).remember("sigma", t, lambda: float(t.max()))


def step_of_run(options: Options, t: Tensor) -> tuple[int, int]:
    """The step that a call with this sigma belongs to, and the number of steps of the run.

    Raises AdapterError when a host calls the model without the wrapper that starts the run.
    """
    sigmas = run_of(options).sigma_list
    if len(sigmas) < 2:
        raise AdapterError(
            "The steps of this sampler are not known: a Weight Schedule over steps and an attention map need them. Use "
            "a sampler of ComfyUI."
        )
    return step_at(sigmas, sigma_of(options, t)), len(sigmas) - 1


def grid_of(shape: Sequence[int]) -> Grid:
    """(height, width) of a latent of this shape."""
    return int(shape[-2]), int(shape[-1])


def _frames(options: Options, images: int) -> tuple[int, ...]:
    """All images, or the window of them that is sampled now (AnimateDiff, ComfyUI's Context Windows)."""
    dim, indices = _window(options)
    frames = (options.get("ad_params") or {}).get("sub_idxs") or (indices if dim == 0 else ())
    return tuple(frames) or tuple(range(images))


def _part(options: Options, size: Grid, whole: Grid) -> Part | None:
    """The rows or columns of the latent in a spatial window (ComfyUI's Context Windows with dim 2 or 3)."""
    dim, indices = _window(options)
    if dim not in (2, 3) or size == whole or len(indices) != size[dim - 2]:
        return None
    return dim, indices


def _window(options: Options) -> tuple[int | None, tuple[int, ...]]:
    """The dimension of the latents and the indices in it of ComfyUI's context window."""
    window = options.get("context_window")
    anchor = getattr(window, "causal_anchor_index", None)  # comes before the window, and is dropped afterwards
    before = () if anchor is None or anchor < 0 else (anchor,)
    return getattr(window, "dim", None), (*before, *getattr(window, "index_list", ()))


def _chunks_together(context: Tensor | None, copies: int, rows: int, chunks: int, *, in_parts: bool) -> bool:
    """Whether a call with several copies of the batch has them one after the other, as nodes that sample in tiles make
    it (Tiled Diffusion: ABABAB), or all copies of a chunk together, as samplers make it (AAABBB). The texts tell; where
    all are the same, copies that are parts of the latent are tiles.

    Raises AdapterError for another order.
    """
    if context is not None and len(context) == rows:
        together = context.reshape(copies, -1, *context.shape[1:])
        apart = context.reshape(chunks, copies, -1, *context.shape[1:])
        orders = {True: together == together[:1], False: apart == apart[:, :1]}
        found = [order for order, same in orders.items() if bool(same.all())]
        if found:
            return in_parts if len(found) == 2 else found[0]
    raise AdapterError(
        f"Another node calls the model with {rows} rows for {chunks} conditionings, {copies} times as many as there "
        "are images, and their order is not known. Set its batch of tiles to 1, or leave it out."
    )
