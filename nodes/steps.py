"""What a step of the sampler means for an adapter: which rows are positive, whether it acts now, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, resize_mask
from ..ipadapter_core.branches import grown_rows, row_branches
from ..ipadapter_core.masks import crop_mask
from .calls import Call, Grid, Options, branches_of, read_call, run_of

SIGMA = "ip_adapter_kit.sigma"  # in transformer_options: the sigma of this call as a number, shared by all adapters


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the model. `active`: within the adapter's window. `rows` [B]: the branch of each row.

    `chunks`: which cond of the guider's list each chunk of the batch is. `gates` has one [B, N, 1] tensor per grid
    of the UNet, the mask times the window, the latent's own grid `size` among them. They are not needed (`gated`
    is False) without a mask, except in a compiled graph, see `SitePatch`.
    """

    active: bool
    rows: Tensor
    chunks: tuple[int, ...] = (0,)
    size: Grid = (0, 0)
    gates: Mapping[Grid, Tensor] = field(default_factory=dict)
    gated: bool = False

    def of(self, options: Options, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """The branch of each row of query [B, N, C], and what to multiply its image attention with: [B, N, 1], or
        None for nothing.
        """
        gate = self._gate(options)
        before, batch = self.rows.shape[0], query.shape[0]
        if batch == before:
            return self.rows, gate
        # Regional prompts grow the batch between the wrapper and the layer, and say how in the options.
        declared = options.get("cond_or_uncond_couple") or options.get("cond_or_uncond") or (0,)
        sources = _on(torch.tensor(grown_rows(declared, self.chunks, before, batch)), query.device)
        return self.rows.index_select(0, sources), None if gate is None else gate.index_select(0, sources)

    def _gate(self, options: Options) -> Tensor | None:
        if not self.gated and not (torch.compiler.is_compiling() and self.gates):
            return None
        height, width = options["activations_shape"][-2:]
        if (height, width) in self.gates:
            return self.gates[height, width]
        # A node that shrinks the activations makes grids that no level of the UNet has.
        finest = self.gates[self.size]
        return resize_mask(finest.reshape(finest.shape[0], *self.size), (int(height), int(width)))


@dataclass(frozen=True, eq=False)
class Application:
    """One Apply node: its key, its window in parts of the schedule (0..1), its mask [M, H, W] or None, and the input
    of it that acts in the negative branch alone ("" for none).

    Called as an APPLY_MODEL wrapper, outside the layers and outside compiled graphs.
    """

    key: str
    start_at: float
    end_at: float
    attn_mask: Tensor | None = None
    negative: str = ""

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

    def check_run(self, sigmas: Tensor, model_sampling: Any, batch: int, size: Grid, cfg: float) -> Iterator[str]:
        """What has no effect in a run over these sigmas, with a batch of latents of `size`, in sentences.

        Raises AdapterError when the mask leaves nothing of the image prompt.
        """
        used = None if self.attn_mask is None else self.attn_mask[:batch]
        if used is not None and not resize_mask(used, size).any():
            if used.any():
                raise AdapterError(
                    f"attn_mask is 0 at every place of the {size[0]} x {size[1]} latent: its area is too small. Grow "
                    "the mask."
                )
            raise AdapterError(
                f"attn_mask has {len(self.attn_mask)} masks, and the first {len(used)}, for the images that are "
                "sampled, are 0 everywhere. Put the masks into the order of the images."
            )
        if not self._is_always_active:
            first, last = (float(model_sampling.percent_to_sigma(end)) for end in (self.start_at, self.end_at))
            if not any(last <= sigma <= first for sigma in sigmas.tolist()):
                yield (
                    f"The image prompt acts in none of these {len(sigmas)} steps: none lies between start_at "
                    f"{self.start_at:g} and end_at {self.end_at:g}."
                )
        if self.negative and cfg == 1.0:
            yield f"{self.negative} acts in the negative branch, which cfg 1 leaves out. Set cfg above 1."

    @property
    def _is_always_active(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0

    def _is_active(self, model_sampling: Any, t: Tensor, options: Options) -> bool:
        """Whether this step is within the window; the one host sync of a step, and only when there is a window."""
        if self._is_always_active:
            return True
        if SIGMA not in options:
            options[SIGMA] = float(t.max())
        first, last = self._window(model_sampling, options)
        return last <= options[SIGMA] <= first

    def _window(self, model_sampling: Any, options: Options) -> tuple[float, float]:
        """The sigmas of the window's ends, looked up once in a run: the table may lie on the device."""
        run = run_of(options)
        windows = {} if run is None else run.windows
        if self.key not in windows:
            ends = (self.start_at, self.end_at)
            windows[self.key] = tuple(float(model_sampling.percent_to_sigma(end)) for end in ends)
        return windows[self.key]

    def _step(self, active: bool, options: Options, x: Tensor) -> Step:
        """The step, from the run's memory when the same has been before: most steps of a run are alike."""
        run, call = run_of(options), read_call(options, x)
        steps = {} if run is None else run.steps
        same = (self.key, active, call)
        if same not in steps:
            rows = _on(torch.tensor(row_branches(call.branches, call.rows)), call.device)
            gates = {grid: self._gate(active, grid, call) for grid in level_grids(call.size)}
            steps[same] = Step(active, rows, call.chunks, call.size, gates, self.attn_mask is not None)
        return steps[same]

    def _gate(self, active: bool, grid: Grid, call: Call) -> Tensor:
        """[B, N, 1]; with several masks, one for each picture of the batch, the last for all that are left."""
        mask = self.attn_mask
        if mask is None or not active:
            shape = (call.rows, grid[0] * grid[1], 1)
            return torch.full(shape, float(active), device=call.device, dtype=call.dtype)
        chunks: list[Tensor] = []
        for corner in call.corners:
            part = mask if corner is None else crop_mask(mask, call.whole, corner, call.size)
            resized = resize_mask(part, grid)
            chunks.append(resized[[min(frame, len(resized) - 1) for frame in call.frames]])
        return _on(torch.cat(chunks).to(call.dtype), call.device)


def step_of(key: str, options: Options, query: Tensor) -> Step:
    """The step that the wrapper prepared; all branches by index when a host calls the layers without it."""
    step = options.get(key)
    if isinstance(step, Step):
        return step
    rows = row_branches(branches_of(options), query.shape[0])
    return Step(True, _on(torch.tensor(rows), query.device))


def level_grids(size: Sequence[int], levels: int = 5) -> list[Grid]:
    """(height, width) of each level of a UNet for a latent of this size: halved, and rounded up, each time."""
    height, width = size
    grids = [(height, width)]
    for _ in range(levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        grids.append((height, width))
    return grids


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)  # blocking copies of unpinned memory would wait for the device
