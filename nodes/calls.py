"""What ComfyUI says about a run of the sampler and about one call of the model in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, step_at
from ..ipadapter_core.branches import resolve_branches, rows_each

RUN = "ip_adapter_kit.run"  # in transformer_options: the Run
_REMEMBERED = 4  # calls: both halves of guidance on their own, with a neighbour each

Options = dict[str, Any]
Grid = tuple[int, int]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sampler on a batch of `images` latents of `size` over `sigmas`, and what was prepared in it (dropped
    with it).

    By the uuid of a cond: `names` in the guider, `corners` (top, left) of conds that cover only an area.
    """

    names: Mapping[Hashable, frozenset[str]] = field(default_factory=dict)
    size: Grid | None = None
    corners: Mapping[Hashable, Grid] = field(default_factory=dict)
    images: int = 0
    sigmas: Tensor | None = None
    made: dict[Hashable, dict[Hashable, Any]] = field(default_factory=dict)
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def remember(self, name: Hashable, key: Hashable, make: Callable[[], _T], keep: int = _REMEMBERED) -> _T:
        """What was made for this key in this run; of each name the latest `keep`."""
        return remember(self.made.setdefault(name, {}), key, make, keep)

    @cached_property
    def sigma_list(self) -> tuple[float, ...]:
        """Read once in a run: they may lie on the device."""
        return () if self.sigmas is None else tuple(self.sigmas.tolist())


@dataclass(frozen=True)
class Call:
    """One call of the model with a batch of `rows` latents of `size`; equal for calls that are alike.

    Of each chunk of the batch: which cond of the guider's list it is (`chunks`), its branch, and where in the
    latent of size `whole` its area begins (`corners`; None covers the whole). `frames`: which images of the
    whole batch a chunk has.
    """

    rows: int
    size: Grid
    whole: Grid
    chunks: tuple[int, ...]
    branches: tuple[int, ...]
    corners: tuple[Grid | None, ...]
    frames: tuple[int, ...]
    device: torch.device


def remember(made: dict[Hashable, _T], key: Hashable, make: Callable[[], _T], keep: int) -> _T:
    """What was made for this key, or is made now; the latest `keep` stay."""
    if key not in made:
        made[key] = make()
        for old in list(made)[:-keep]:
            made.pop(old, None)
    return made[key]


def read_call(options: Options, x: Tensor, size: Grid | None = None) -> Call:
    """The call that ComfyUI makes with these transformer options and this input [B, C, H, W]; in a layer with its query
    [B, N, C] and the `size` of the latent.

    Raises AdapterError when the batch does not divide into the conds.
    """
    run = run_of(options) or Run()
    chunks = tuple(options.get("cond_or_uncond") or (0,))
    uuids = options.get("uuids") or ()
    corners = run.corners if len(uuids) == len(chunks) else {}
    size = size or grid_of(x.shape)
    return Call(
        rows=x.shape[0],
        size=size,
        whole=run.size or size,
        chunks=chunks,
        branches=branches_of(options),
        corners=tuple(corners.get(uuid) for uuid in uuids) if corners else (None,) * len(chunks),
        frames=_frames(options, rows_each(len(chunks), x.shape[0])),
        device=x.device,
    )


def branches_of(options: Options) -> tuple[int, ...]:
    """The branch of each chunk of the batch."""
    run = run_of(options)
    names = None if run is None else run.names
    return resolve_branches(options.get("cond_or_uncond") or (0,), options.get("uuids"), names)


def run_of(options: Options) -> Run | None:
    """The run, or None when a host calls the model without the wrapper that starts it."""
    run = options.get(RUN)
    return run if isinstance(run, Run) else None


def sigma_of(options: Options, t: Tensor) -> float:
    """The sigma of this call; the one host sync of a step, shared by all that need it. It stays out of the options: a
    compiled graph would be one for this number.
    """
    return (run_of(options) or Run()).remember("sigma", t, lambda: float(t.max()))


def step_of_run(options: Options, t: Tensor) -> tuple[int, int]:
    """The step that a call with this sigma belongs to, and the number of steps of the run.

    Raises AdapterError when a host calls the model without the wrapper that starts the run.
    """
    run = run_of(options)
    if run is None or len(run.sigma_list) < 2:
        raise AdapterError(
            "The steps of this sampler are not known: a Weight Schedule over steps and an attention map need them. Use "
            "a sampler of ComfyUI."
        )
    return step_at(run.sigma_list, sigma_of(options, t)), len(run.sigma_list) - 1


def grid_of(shape: Sequence[int]) -> Grid:
    """(height, width) of a latent of this shape."""
    return int(shape[-2]), int(shape[-1])


def _frames(options: Options, count: int) -> tuple[int, ...]:
    """All images, or a window of them that is sampled on its own (AnimateDiff, ComfyUI's Context Windows)."""
    window = options.get("context_window")
    frames = (options.get("ad_params") or {}).get("sub_idxs")
    if not frames and getattr(window, "dim", None) == 0:
        anchor = getattr(window, "causal_anchor_index", None)  # a frame before the window, dropped afterwards
        before = [] if anchor is None or anchor < 0 else [anchor]
        frames = [*before, *window.index_list]
    return tuple(frames) if frames and len(frames) == count else tuple(range(count))
