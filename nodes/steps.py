"""What a step of the sampler means for an adapter: which rows are positive, whether it acts now, and where."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ipadapter_core import resize_mask
from ..ipadapter_core.branches import chunk_branches, names_by_uuid, row_branches

RUN = "ip_adapter_kit.run"  # in transformer_options: the Run
SIGMA = "ip_adapter_kit.sigma"  # the sigma of this call as a number, shared by all adapters

Options = dict[str, Any]
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sampler: the names of its conds by uuid, and what was prepared in it (dropped with it)."""

    names: Mapping[Hashable, frozenset[str]]
    steps: dict[Hashable, Step] = field(default_factory=dict)
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the model. `active`: within the adapter's window. `rows` [B]: the branch of each row.

    `gates` has one [B, N, 1] tensor per grid of the UNet, the mask times the window. They are not needed
    (`gated` is False) without a mask, except in a compiled graph, see `SitePatch`.
    """

    active: bool
    rows: Tensor
    gates: Mapping[Grid, Tensor] = field(default_factory=dict)
    gated: bool = False
    attn_mask: Tensor | None = None

    def gate(self, options: Options, query: Tensor) -> Tensor | None:
        """What to multiply the image attention of query [B, N, C] with: [B or 1, N, 1], or None for nothing."""
        if not self.gated and not (torch.compiler.is_compiling() and self.gates):
            return None
        height, width = options["activations_shape"][-2:]
        if (height, width) in self.gates:
            return self.gates[height, width]
        # A node that shrinks the activations makes grids that no level of the UNet has.
        return None if self.attn_mask is None else resize_mask(self.attn_mask, (int(height), int(width))).to(query)


@dataclass(frozen=True, eq=False)
class Application:
    """One Apply node: its key, its window in parts of the schedule (0..1), its mask [M, H, W] or None.

    Called as an APPLY_MODEL wrapper, outside the layers and outside compiled graphs.
    """

    key: str
    start_at: float
    end_at: float
    attn_mask: Tensor | None = None

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        active = self._is_active(executor.class_obj.model_sampling, t, options)
        options[self.key] = self._step(active, options, x)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self

    def _is_active(self, model_sampling: Any, t: Tensor, options: Options) -> bool:
        """Whether this step is within the window; the one host sync of a step, and only when there is a window."""
        if self.start_at <= 0.0 and self.end_at >= 1.0:
            return True
        if SIGMA not in options:
            options[SIGMA] = float(t.max())
        first, last = self._window(model_sampling, options.get(RUN))
        return last <= options[SIGMA] <= first

    def _window(self, model_sampling: Any, run: Run | None) -> tuple[float, float]:
        """The sigmas of the window's ends, looked up once in a run: the table may lie on the device."""
        windows = run.windows if isinstance(run, Run) else {}
        if self.key not in windows:
            ends = (self.start_at, self.end_at)
            windows[self.key] = tuple(float(model_sampling.percent_to_sigma(end)) for end in ends)
        return windows[self.key]

    def _step(self, active: bool, options: Options, x: Tensor) -> Step:
        """The step, from the run's memory when the same has been before: most steps of a run are alike."""
        run = options.get(RUN)
        chunks = tuple(options.get("cond_or_uncond") or (0,))
        frames = tuple((options.get("ad_params") or {}).get("sub_idxs") or range(x.shape[0] // len(chunks)))
        branches = _branches(options)
        same = (self.key, active, x.device, x.dtype, tuple(x.shape), frames, branches)
        steps = run.steps if isinstance(run, Run) else {}
        if same not in steps:
            rows = _on(torch.tensor(row_branches(branches, x.shape[0])), x.device)
            gates = {grid: self._gate(active, grid, len(chunks), frames, x) for grid in level_grids(x.shape[-2:])}
            steps[same] = Step(active, rows, gates, self.attn_mask is not None, self.attn_mask)
        return steps[same]

    def _gate(self, active: bool, grid: Grid, chunks: int, frames: tuple[int, ...], x: Tensor) -> Tensor:
        """[B, N, 1]; with several masks, one for each picture of the batch, the last for all that are left."""
        if self.attn_mask is None or not active:
            return torch.full((x.shape[0], grid[0] * grid[1], 1), float(active), device=x.device, dtype=x.dtype)
        mask = resize_mask(self.attn_mask, grid)
        mask = mask[[min(frame, mask.shape[0] - 1) for frame in frames]]
        return _on(mask.to(x.dtype), x.device).repeat(chunks, 1, 1)


def start_run(executor: Any, guider: Any, sigmas: Tensor, extra_args: Options, *args: Any, **kwargs: Any) -> Any:
    """SAMPLER_SAMPLE wrapper: note which cond is positive and which negative, for all adapters of the model."""
    model_options = dict(extra_args.get("model_options") or {})
    run = Run(names_by_uuid(getattr(guider, "conds", None) or {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), RUN: run}
    return executor(guider, sigmas, {**extra_args, "model_options": model_options}, *args, **kwargs)


def step_of(key: str, options: Options, query: Tensor) -> Step:
    """The step that the wrapper prepared; all branches by index when a host calls the layers without it."""
    step = options.get(key)
    if isinstance(step, Step):
        return step
    rows = row_branches(_branches(options), query.shape[0])
    return Step(True, _on(torch.tensor(rows), query.device))


def level_grids(size: Sequence[int], levels: int = 5) -> list[Grid]:
    """(height, width) of each level of a UNet for a latent of this size: halved, and rounded up, each time."""
    height, width = size
    grids = [(height, width)]
    for _ in range(levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        grids.append((height, width))
    return grids


def _branches(options: Options) -> tuple[int, ...]:
    run = options.get(RUN)
    names = run.names if isinstance(run, Run) else None
    return chunk_branches(options.get("cond_or_uncond") or (0,), options.get("uuids"), names)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)  # blocking copies of unpinned memory would wait for the device
