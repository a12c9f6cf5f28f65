"""What a step of the sampler means for an adapter: the keys and values of each row, whether it acts now, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, KeyValue, WeightSchedule, resize_mask
from ..ipadapter_core.branches import POSITIVE, source_rows
from ..ipadapter_core.masks import crop_mask
from .calls import Call, Grid, Options, Run, grid_of, read_call, run_of, sigma_of, step_of_run

Place = tuple[str, int, int]  # ComfyUI's key of an attention layer, such as ("input", 1, 0)


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the model with a batch of B rows. `active`: within the adapter's window, and not scheduled to be 0.

    `rows`: which row of the application's keys and values each row of the batch takes. `pairs`: these keys and values
    by the layer's place, [B, H, T, d], on the device of the call. `chunks`: which cond of the guider's list each chunk
    of the batch is. `gates` has one [B, N, 1] tensor per grid of the UNet, the mask times window and schedule, the
    latent's own grid `size` among them; empty where nothing is to be multiplied.
    """

    active: bool
    rows: tuple[int, ...]
    pairs: Mapping[Place, KeyValue]
    chunks: tuple[int, ...]
    size: Grid
    gates: Mapping[Grid, Tensor] = field(default_factory=dict)

    def of(self, place: Place, options: Options, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, T, d] for query [B, N, C], and what to multiply its image attention with: [B, N, 1],
        or None for nothing.
        """
        (key, value), gate = self.pairs[place], self._gate(options)
        if key.dtype != query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
            gate = None if gate is None else gate.to(query.dtype)
        batch = query.shape[0]
        if batch == len(self.rows):
            return key, value, gate
        # Regional prompts grow the batch between the wrapper and the layer, and say how in the options.
        declared = options.get("cond_or_uncond_couple") or options.get("cond_or_uncond") or (0,)
        sources = _on(torch.tensor(source_rows(declared, self.chunks, len(self.rows), batch)), query.device)
        key, value = key.index_select(0, sources), value.index_select(0, sources)
        return key, value, None if gate is None else gate.index_select(0, sources)

    def _gate(self, options: Options) -> Tensor | None:
        if not self.gates:
            return None
        height, width = options["activations_shape"][-2:]
        if (height, width) in self.gates:
            return self.gates[height, width]
        # A node that shrinks the activations makes grids that no level of the UNet has.
        finest = self.gates[self.size]
        return resize_mask(finest.reshape(finest.shape[0], *self.size), (int(height), int(width)))


@dataclass(frozen=True, eq=False)
class Application:
    """One image prompt in a model: its key, its keys and values, its window in parts of the noise schedule (0..1), its
    mask [M, H, W] or None, the input of it that acts in the negative branch alone ("" for none), the schedule of its
    weight, and the name of the mask's input. `checked`: a mask that leaves nothing of it is an error; without, it is of
    an old name. `node` is the node that made it.

    `pairs` has by place [P + N, H, T, d] tensors on the offload device: the rows of the positive branch, then those of
    the negative one, all weights inside. `rows` is (P, N): 1 each, or one for each image of a batch.

    Called as an APPLY_MODEL wrapper, outside the layers and outside compiled graphs.
    """

    key: str
    pairs: Mapping[Place, KeyValue]
    rows: tuple[int, int] = (1, 1)
    start_at: float = 0.0
    end_at: float = 1.0
    attn_mask: Tensor | None = None
    negative: str = ""
    schedule: WeightSchedule | None = None
    mask_name: str = "attn_mask"
    checked: bool = True
    node: str = "Apply IP Adapter"

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
        call = read_call(options, x)
        active = self._is_active(executor.class_obj.model_sampling, t, options)
        factors = self.factors(t, options, call) if active else (0.0,) * len(call.frames)
        options[self.key] = self.step(factors, options, call)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self  # ComfyUI before 0.14 deep-copies what a model holds whenever it is cloned

    def check_run(self, sigmas: Tensor, model_sampling: Any, batch: int, size: Grid, cfg: float) -> Iterator[str]:
        """What has no effect in a run over these sigmas, with a batch of latents of `size`, in sentences.

        Raises AdapterError when the mask leaves nothing of the image prompt, if it is `checked`.
        """
        used = None if self.attn_mask is None or not self.checked else self.attn_mask[:batch]
        if used is not None and not resize_mask(used, size).any():
            if used.any():
                raise AdapterError(
                    f"{self.mask_name} is 0 at every place of the {size[0]} x {size[1]} latent: its area is too small. "
                    "Grow the mask."
                )
            raise AdapterError(
                f"{self.mask_name} has {len(self.attn_mask)} masks, and the first {len(used)}, for the images that are "
                "sampled, are 0 everywhere. Put the masks into the order of the images."
            )
        masks = 0 if self.attn_mask is None else len(self.attn_mask)
        if masks > batch:
            unused = f"mask {masks} is" if masks == batch + 1 else f"masks {batch + 1} to {masks} are"
            yield (
                f"{self.mask_name} has {masks} masks, one for each latent, and {batch} "
                f"{'is' if batch == 1 else 'are'} sampled: {unused} not used. Sample {masks} latents, or leave masks "
                "out."
            )
        if not self._is_always_active:
            first, last = (float(model_sampling.percent_to_sigma(end)) for end in (self.start_at, self.end_at))
            if not any(last <= sigma <= first for sigma in sigmas.tolist()):
                yield (
                    f"The image prompt acts in none of these {len(sigmas)} steps: none lies between start_at "
                    f"{self.start_at:g} and end_at {self.end_at:g}."
                )
        images = self.rows[0]
        if images > batch:
            unused = f"image {images} acts" if images == batch + 1 else f"images {batch + 1} to {images} act"
            remedy = "turn one_each off" if self.checked else "connect fewer images and weights"
            yield (
                f"The image prompt has {images} images, one for each latent, and {batch} "
                f"{'is' if batch == 1 else 'are'} sampled: {unused} in none. Sample {images} latents, or {remedy}."
            )
        if self.schedule is not None:
            yield from self.schedule.notes(batch if self.schedule.over == "frames" else len(sigmas))
        if self.negative and cfg == 1.0:
            yield f"{self.negative} acts in the negative branch, which cfg 1 leaves out. Set cfg above 1."

    @property
    def _is_always_active(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0

    def _is_active(self, model_sampling: Any, t: Tensor, options: Options) -> bool:
        """Whether this step is within the window; asks for the sigma only when there is a window."""
        if self._is_always_active:
            return True
        first, last = self._window(model_sampling, options)
        return last <= sigma_of(options, t) <= first

    def factors(self, t: Tensor, options: Options, call: Call) -> tuple[float, ...]:
        """What the schedule multiplies each image of the batch with in this call."""
        if self.schedule is None:
            return (1.0,) * len(call.frames)
        if self.schedule.over == "steps":
            step, steps = step_of_run(options, t)
            return (self.schedule.factors(steps)[step],) * len(call.frames)
        run = run_of(options) or Run()
        factors = self.schedule.factors(max(run.images, *(frame + 1 for frame in call.frames)))
        return tuple(factors[frame] for frame in call.frames)

    def _window(self, model_sampling: Any, options: Options) -> tuple[float, float]:
        """The sigmas of the window's ends, looked up once in a run: the table may lie on the device."""
        run = run_of(options)
        windows = {} if run is None else run.windows
        if self.key not in windows:
            ends = (self.start_at, self.end_at)
            windows[self.key] = tuple(float(model_sampling.percent_to_sigma(end)) for end in ends)
        return windows[self.key]

    def step(self, factors: tuple[float, ...], options: Options, call: Call) -> Step:
        """The step of a call, with a factor for each image of the batch; most calls of a run are alike, so its parts
        are kept for the next ones.
        """
        active = any(factors)
        run = run_of(options) or Run()
        rows, pairs, gates = self.batch_rows(call), {}, {}
        if active:
            keep = 4 if self.rows == (1, 1) else 2  # of an image for each frame, the halves of one window
            name, key = ("pairs", self.key), (rows, call.device)
            pairs = run.remember(name, key, lambda: self._select(rows, call.device), keep)
        # A schedule has gates in all steps, or a compiled graph would be one for a factor of 1 and one for the others.
        if active and (self.attn_mask is not None or self.schedule is not None):
            gates = run.remember(("gates", self.key), (factors, call), lambda: self._gates(factors, call))
        return Step(active, rows, pairs, call.chunks, call.size, gates)

    def batch_rows(self, call: Call) -> tuple[int, ...]:
        """Which row of `pairs` each row of the batch takes; the last image is for all frames that are left."""
        positives, negatives = self.rows
        starts = {branch: (0, positives) if branch == POSITIVE else (positives, negatives) for branch in call.branches}
        return tuple(
            start + min(frame, count - 1)
            for start, count in (starts[branch] for branch in call.branches)
            for frame in call.frames
        )

    def _select(self, rows: Sequence[int], device: torch.device) -> dict[Place, KeyValue]:
        """Only the rows that this call needs go to the device, each once."""
        needed = sorted(set(rows))
        home = torch.tensor(needed)
        here = _on(torch.tensor([needed.index(row) for row in rows]), device)

        def select(part: Tensor) -> Tensor:
            return _on(part.index_select(0, home.to(part.device)), device).index_select(0, here)

        return {place: KeyValue(*map(select, pair)) for place, pair in self.pairs.items()}

    def _gates(self, factors: tuple[float, ...], call: Call) -> dict[Grid, Tensor]:
        # In the dtype of the layers: the latents of the call are still fp32, and the layers would get fp32 back.
        dtype = next(iter(self.pairs.values())).key.dtype
        scale = _on(torch.tensor(factors * len(call.chunks), dtype=dtype), call.device).reshape(-1, 1, 1)
        return {grid: self._gate(scale, grid, call) for grid in level_grids(call.size)}

    def _gate(self, scale: Tensor, grid: Grid, call: Call) -> Tensor:
        """[B, N, 1]; with several masks, one for each image of the batch, the last for all that are left."""
        mask = self.attn_mask
        if mask is None:
            return scale.expand(-1, grid[0] * grid[1], -1).contiguous()
        chunks: list[Tensor] = []
        for corner in call.corners:
            part = mask if corner is None else crop_mask(mask, call.whole, corner, call.size)
            resized = resize_mask(part, grid)
            chunks.append(resized[[min(frame, len(resized) - 1) for frame in call.frames]])
        return _on(torch.cat(chunks).to(scale.dtype), call.device) * scale


def step_of(application: Application, options: Options, query: Tensor) -> Step:
    """The step that the wrapper prepared; made here when a host calls the layers without it."""
    step = options.get(application.key)
    if isinstance(step, Step):
        return step
    call = read_call(options, query, grid_of(options["original_shape"]))
    return application.step(application.factors(options.get("sigmas"), options, call), options, call)


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
