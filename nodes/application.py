"""Once per call of the model: whether an image prompt acts, with which keys and values for each row, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, KeyValue, WeightSchedule, resize_mask
from ..ipadapter_core.branches import POSITIVE
from ..ipadapter_core.masks import crop_mask, select_mask
from .run import Call, Grid, Options, Place, grid_of, read_call, run_of, sigma_of, step_of_run


@dataclass(frozen=True, eq=False)
class Step:
    """What the layers need in one call of the model with a batch of B rows.

    `active`: within the application's window, and its schedule is not 0. `rows`: the row of `Application.pairs` for
    each row of the batch; `pairs`: these rows by the layer's place, [B, H, T, d], on the device of the call. `gates`:
    mask times schedule, one [B, N, 1] tensor per grid of the UNet, the latent's own among them; empty for no factor.
    """

    active: bool
    call: Call
    rows: tuple[int, ...]
    pairs: Mapping[Place, KeyValue]
    gates: Mapping[Grid, Tensor] = field(default_factory=dict)

    def of(self, place: Place, options: Options, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, T, d] for query [B, N, C], and the factor of their attention, [B, N, 1] or None."""
        (key, value), gate = self.pairs[place], self._gate(options, query.shape[1])
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
            gate = None if gate is None else gate.to(query.dtype)
        batch = query.shape[0]
        if batch == len(self.rows):
            return key, value, gate
        # Regional prompts enlarge the batch between the wrapper and the layer.
        rows = _on(torch.tensor(self.call.sources(options, batch)), query.device)
        return (
            key.index_select(0, rows),
            value.index_select(0, rows),
            None if gate is None else gate.index_select(0, rows),
        )

    def _gate(self, options: Options, queries: int) -> Tensor | None:
        if not self.gates:
            return None
        height, width = options["activations_shape"][-2:]
        if height * width != queries:
            raise AdapterError(
                f"A layer has {queries} queries for a grid of {height} x {width}: another node merges them. A mask or "
                "a Weight Schedule needs each one; leave that node out."
            )
        if (height, width) in self.gates:
            return self.gates[height, width]
        # A node that shrinks the activations makes grids that no level of the UNet has.
        finest = self.gates[self.call.size]
        return resize_mask(finest.reshape(finest.shape[0], *self.call.size), (int(height), int(width)))


@dataclass(frozen=True, eq=False)
class Application:
    """One image prompt in a model. Called as an APPLY_MODEL wrapper: once per call of the model, outside the layers
    and outside compiled graphs.

    `pairs`: keys and values by place, [P + N, H, T, d] on the offload device, all weights folded in; first the P rows
    of the positive branch, then the N of the negative one. `rows` is (P, N): 1 each, or one for each image of a batch.
    `start_at` and `end_at`: the window in parts of the noise schedule. `attn_mask`: [M, H, W]; `mask_name` is its
    input. `negative`: the input that acts in the negative branch only ("" for none). `checked`: a mask that hides the
    whole image prompt is an error, as everywhere but in the old nodes. `node`: the title of the node, for the log.
    """

    key: str
    node: str
    pairs: Mapping[Place, KeyValue]
    rows: tuple[int, int] = (1, 1)
    start_at: float = 0.0
    end_at: float = 1.0
    attn_mask: Tensor | None = None
    negative: str = ""
    schedule: WeightSchedule | None = None
    mask_name: str = "attn_mask"
    checked: bool = True

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
        call = read_call(options, x, context=c_crossattn)
        if self.checked:
            self.check_call(call, options)
        active = self._is_active(executor.class_obj.model_sampling, t, options)
        factors = self.factors(t, options, call) if active else (0.0,) * len(call.frames)
        options[self.key] = self.step(factors, options, call)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self  # ComfyUI before 0.14 deep-copies what a model holds whenever it is cloned

    def check_call(self, call: Call, options: Options) -> None:
        """Raises AdapterError when it matters which images, or which part of them, a call has, and the node that makes
        it does not say so.
        """
        masks = 0 if self.attn_mask is None else len(self.attn_mask)
        over_frames = self.schedule is not None and self.schedule.over == "frames"
        if not call.known and (self.rows != (1, 1) or masks > 1 or over_frames):
            raise AdapterError(
                f"{self.node}: another node calls the model with {len(call.frames)} of {run_of(options).images} "
                "images, and does not say which. Use one image prompt, mask and weight for all, or leave that node out."
            )
        if masks and not call.is_placed:
            (height, width), (whole_height, whole_width) = call.size, call.whole
            raise AdapterError(
                f"{self.node}: another node samples the {whole_width} x {whole_height} latent in parts of {width} x "
                f"{height}, and does not say where they are. {self.mask_name} needs that: disconnect it, or leave that "
                "node out (such as Tiled Diffusion)."
            )

    @property
    def is_always_active(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0

    def _is_active(self, model_sampling: Any, t: Tensor, options: Options) -> bool:
        """Whether this step is within the window; asks for the sigma only when there is a window."""
        if self.is_always_active:
            return True
        # Once in a run: the table of sigmas may be on the device.
        first, last = run_of(options).remember(("window", self.key), None, lambda: self.window(model_sampling))
        return last <= sigma_of(options, t) <= first

    def window(self, model_sampling: Any) -> tuple[float, float]:
        """The sigmas of `start_at` and `end_at`."""
        first, last = (float(model_sampling.percent_to_sigma(end)) for end in (self.start_at, self.end_at))
        return first, last

    def factors(self, t: Tensor, options: Options, call: Call) -> tuple[float, ...]:
        """The schedule's factor for each image of the batch in this call."""
        if self.schedule is None:
            return (1.0,) * len(call.frames)
        if self.schedule.over == "steps":
            step, steps = step_of_run(options, t)
            return (self.schedule.factors(steps)[step],) * len(call.frames)
        factors = self.schedule.factors(max(run_of(options).images, *(frame + 1 for frame in call.frames)))
        return tuple(factors[frame] for frame in call.frames)

    def step(self, factors: tuple[float, ...], options: Options, call: Call) -> Step:
        """The step of a call, with a factor for each image of the batch. Most calls of a run are alike, so its tensors
        are cached.
        """
        active, run = any(factors), run_of(options)
        rows, pairs, gates = self.batch_rows(call), {}, {}
        if active:
            size = 4 if self.rows == (1, 1) else 2  # with an image for each frame: both branches of one window
            name, key = ("pairs", self.key), (rows, call.device)
            pairs = run.remember(name, key, lambda: self._select(rows, call.device), size)
        # A schedule has gates in all steps, or torch.compile would make one graph with and one without.
        if active and (self.attn_mask is not None or self.schedule is not None):
            gates = run.remember(("gates", self.key), (factors, call), lambda: self._gates(factors, call))
        return Step(active, call, rows, pairs, gates)

    def batch_rows(self, call: Call) -> tuple[int, ...]:
        """The row of `pairs` for each row of the batch; the last image is used for all remaining frames."""
        positives, negatives = self.rows
        starts = {branch: (0, positives) if branch == POSITIVE else (positives, negatives) for branch in call.branches}
        rows = tuple(
            start + min(frame, count - 1)
            for start, count in (starts[branch] for branch in call.branches)
            for frame in call.frames
        )
        return rows * call.copies

    def _select(self, rows: Sequence[int], device: torch.device) -> dict[Place, KeyValue]:
        """The rows of `pairs` for this call, on the device; each row is copied once."""
        needed = sorted(set(rows))
        offloaded_rows = torch.tensor(needed)
        batch_rows = _on(torch.tensor([needed.index(row) for row in rows]), device)

        def select(part: Tensor) -> Tensor:
            return _on(part.index_select(0, offloaded_rows.to(part.device)), device).index_select(0, batch_rows)

        return {place: KeyValue(*map(select, pair)) for place, pair in self.pairs.items()}

    def _gates(self, factors: tuple[float, ...], call: Call) -> dict[Grid, Tensor]:
        # In the dtype of the layers: the latents of the call are still fp32, and the layers would get fp32 back.
        dtype = next(iter(self.pairs.values())).key.dtype
        factors = factors * len(call.chunks) * call.copies
        scale = _on(torch.tensor(factors, dtype=dtype), call.device).reshape(-1, 1, 1)
        return {grid: self._gate(scale, grid, call) for grid in level_grids(call.size)}

    def _gate(self, scale: Tensor, grid: Grid, call: Call) -> Tensor:
        """[B, N, 1]. With several masks each image has its own, and the last is used for all remaining images."""
        mask = self.attn_mask
        if mask is None:
            return scale.expand(-1, grid[0] * grid[1], -1).contiguous()
        chunks: list[Tensor] = []
        for corner in call.corners:
            part = mask
            if corner is not None:
                part = crop_mask(mask, call.whole, corner, call.size)
            elif call.part is not None:
                part = select_mask(mask, call.whole, *call.part)
            resized = resize_mask(part, grid)
            chunks.append(resized[[min(frame, len(resized) - 1) for frame in call.frames]])
        return _on(torch.cat(chunks * call.copies).to(scale.dtype), call.device) * scale


def step_of(application: Application, options: Options, query: Tensor) -> Step:
    """The step that the wrapper prepared; made here when a host calls the layers without it."""
    step = options.get(application.key)
    if isinstance(step, Step):
        return step
    call = read_call(options, query, grid_of(options["original_shape"]))
    factors = application.factors(cast("Tensor", options.get("sigmas")), options, call)
    return application.step(factors, options, call)


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
