"""The attention of image prompts, recorded by the layers while a model is sampled, for an attention map."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from comfy_execution.utils import get_executing_context
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ipadapter_core import AdapterError, WeightLayout, group_indices, image_share
from ..ipadapter_core.branches import POSITIVE
from .run import Call, Grid, Options, Part, Place, read_call, run_of, step_of_run

_log = logging.getLogger("ip_adapter_kit")

TEXT = ""  # the key of the attention to the text, beside those of applications


class Area(NamedTuple):
    """The part that a cond covers of the latents, which are of size `whole`: its corner (top, left), its size, and
    which images; or which rows or columns of them, in a spatial window.
    """

    corner: Grid
    size: Grid
    whole: Grid
    images: tuple[int, ...]
    part: Part | None = None


class Entry(NamedTuple):
    """The key of one sum of magnitudes; `key` is that of an application, or `TEXT`."""

    step: int
    transformer: int
    key: str
    area: Area
    grid: Grid


@dataclass(frozen=True, eq=False)
class Moment:
    """One call of the model: its step, and its positive rows by area."""

    step: int
    call: Call
    rows: dict[Area, tuple[int, ...]]

    def rows_in(self, batch: int, options: Options) -> Iterator[tuple[Area, list[int]]]:
        """The positive rows of a batch within a layer, where regional prompts may have enlarged it."""
        sources = list(range(self.call.rows))
        if batch != self.call.rows:
            sources = self.call.sources(options, batch)
        for area, rows in self.rows.items():
            # Row i of each chunk is that of image i, so the rows of an area come image by image.
            yield area, [place for place, source in enumerate(sources) if source in rows]


@dataclass(eq=False)
class Record:
    """The magnitudes of the attentions in one run of the sampler, summed over the positive rows of each image. Those of
    the `latest` step are on the device, earlier ones in main memory; the next run of the same model replaces them.

    `keys`: of the image prompts, in the order of their nodes; `off`: those of weight 0, which have no application.
    `transformers`: their indices by ComfyUI's block. `runs`: the number of runs so far; `prompt`: ComfyUI's id of the
    latest one's prompt. `drawn`: image -> the record of the run that made it, while the image is in memory.
    """

    keys: tuple[str, ...]
    layout: WeightLayout
    transformers: dict[tuple[str, int], int]
    off: frozenset[str] = frozenset()
    steps: int = 0
    images: int = 0
    size: Grid = (0, 0)
    latest: int = -1
    sums: dict[Entry, Tensor] = field(default_factory=dict[Entry, Tensor], repr=False)
    runs: int = 0
    prompt: str | None = None
    drawn: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary, repr=False)

    @property
    def name(self) -> str:
        """The key of the Moment in transformer_options."""
        return f"ip_adapter_kit.record.{id(self)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return self  # ComfyUI before 0.14 deep-copies what a model holds whenever it is cloned

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: Options, *args: Any, **kwargs: Any) -> Any:
        """SAMPLER_SAMPLE wrapper: start a new record."""
        if "torch_compile_kwargs" in (extra_args.get("model_options") or {}):
            raise AdapterError(
                "Record Attention Map cannot look into a compiled model. Bypass the node that compiles it while you "
                "look at the map; the images are the same."
            )
        patches = guider.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
        if any(getattr(patch, "record", self) is None for patch in patches.values()):
            _log.warning(
                "Record Attention Map: an Apply IP Adapter comes after it and is not recorded. Connect it before."
            )
        self.steps, self.latest, self.sums, self.size = len(sigmas) - 1, -1, {}, (0, 0)
        self.runs, self.prompt = self.runs + 1, _prompt()
        try:
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        finally:
            self._to_main_memory()

    def _to_main_memory(self) -> None:
        self.sums = {entry: total.cpu() for entry, total in self.sums.items()}

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
        """APPLY_MODEL wrapper: note the step and the rows to record."""
        options = dict(transformer_options or {})
        step, _ = step_of_run(options, t)
        if step != self.latest:
            self._to_main_memory()
            self.latest = step
        call, run = read_call(options, x, context=c_crossattn), run_of(options)
        _check_place(call)
        self.images = run.images or len(call.frames)
        self.size = max(self.size, call.whole)  # some samplers enlarge the latent from step to step
        options[self.name] = Moment(step, call, _positive_rows(call))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def add(self, place: Place, key: str, term: Tensor, options: Options) -> None:
        """Record an attention, [B, N, C]."""
        moment = options.get(self.name)
        if not isinstance(moment, Moment):
            return
        grid = options["activations_shape"][-2:]
        if grid[0] * grid[1] != term.shape[1]:
            raise AdapterError(
                f"Record Attention Map: a layer has {term.shape[1]} queries for a grid of {grid[0]} x {grid[1]}. "
                "Another node merges them; bypass it while you look at the map."
            )
        magnitudes = term.abs().mean(-1, dtype=torch.float32)
        for area, rows in moment.rows_in(len(term), options):
            entry = Entry(moment.step, self.transformers[place[:2]], key, area, (int(grid[0]), int(grid[1])))
            chosen = magnitudes[rows[0] : rows[-1] + 1] if _is_range(rows) else magnitudes[rows]
            total = chosen.reshape(-1, len(area.images), chosen.shape[-1]).sum(0)
            before = self.sums.get(entry)
            self.sums[entry] = total if before is None else before.add_(total.to(before.device))

    def of(self, image: Tensor) -> Record:
        """The record of the run that made an image. ComfyUI may take an image from its cache after other runs of the
        same model: then it is the record that was used for this image before, or the latest one, with a warning.
        """
        if self.prompt == _prompt() or image not in self.drawn:
            if self.runs > 1 and self.prompt != _prompt():
                _log.warning(
                    "Attention Map: ComfyUI took the image from its cache, and %d runs of the sampler were recorded. "
                    "The map is that of the latest one; if another one made the image, sample with a new seed.",
                    self.runs,
                )
            self.drawn[image] = replace(self, drawn=WeakIdKeyDictionary())
        return self.drawn[image]

    def heat(self, layers: str, first: int, last: int, number: int = 0) -> Tensor:
        """The mean share of an image prompt in the attention of these layers (see `group_indices`), in the steps from
        `first` up to, not including, `last`: [images, height, width] of the latents, in 0..1. `number` counts the
        prompts from 1; 0 is all of them together.

        Raises AdapterError when nothing was recorded, or not what is asked for.
        """
        indices, last = group_indices(layers, self.layout), min(last, self.steps)
        if 0 < number <= len(self.keys) and self.keys[number - 1] in self.off:
            raise AdapterError(
                f"prompt is {number}, and image prompt {number} is off (weight 0). Raise its weight, or choose another "
                "number; 0 is all of them together."
            )
        if not self.sums:
            raise AdapterError(
                "Nothing was recorded. Connect the model of Record Attention Map to the sampler that makes the image."
            )
        if not first < last:
            raise AdapterError(
                f"Steps from {first} up to {last} hold none of the {self.steps} steps that were recorded. Change "
                "start_at_step or end_at_step."
            )
        if number > len(self.keys):
            raise AdapterError(
                f"prompt is {number}; the recorded model has {len(self.keys)} image "
                f"prompt{'s' * (len(self.keys) != 1)}. Choose a lower number, or 0 for all."
            )
        keys = self.keys[number - 1 : number] if number else self.keys
        totals: dict[tuple[int, int], dict[str, Tensor]] = {}
        for entry, total in self.sums.items():
            if entry.transformer in indices and first <= entry.step < last:
                of = totals.setdefault((entry.step, entry.transformer), {})
                of[entry.key] = of.get(entry.key, torch.zeros(self.images, *self.size)) + self._canvas(entry, total)
        shares = [
            image_share(sum((of[key] for key in keys if key in of), torch.zeros(())), _rest(of, keys))
            for of in totals.values()
        ]
        if not shares:
            raise AdapterError(
                f"No image prompt acts in the layers {layers!r} of this model. Choose 'all', or another weight_type in "
                "Apply IP Adapter."
            )
        return torch.stack(shares).mean(0)

    def _canvas(self, entry: Entry, total: Tensor) -> Tensor:
        """The magnitudes of an area within the whole latents of the last size, [images, height, width]."""
        (top, left), (height, width), size, images, window = entry.area
        part = F.interpolate(total.reshape(-1, 1, *entry.grid), size=(height, width), mode="bilinear")[:, 0]
        canvas = torch.zeros(self.images, *size)
        if window is not None:
            dim, indices = window
            whole = torch.zeros(len(images), *size)
            canvas[list(images)] = whole.index_copy(dim - 1, torch.tensor(indices), part)
        else:
            canvas[list(images), top : top + height, left : left + width] = part
        return canvas if size == self.size else F.interpolate(canvas[:, None], size=self.size, mode="bilinear")[:, 0]


def _prompt() -> str | None:
    """ComfyUI's id of the prompt that is executed now."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def _rest(totals: dict[str, Tensor], keys: tuple[str, ...]) -> Tensor:
    """The sum of all attention but that of the chosen image prompts."""
    return sum((total for key, total in totals.items() if key not in keys), torch.zeros(()))


def _positive_rows(call: Call) -> dict[Area, tuple[int, ...]]:
    each, chunks = len(call.frames), len(call.chunks)
    rows: dict[Area, tuple[int, ...]] = {}
    for chunk, (branch, corner) in enumerate(zip(call.branches, call.corners, strict=True)):
        if branch == POSITIVE:
            area = Area(corner or (0, 0), call.size, call.whole, call.frames, call.part)
            starts = ((copy * chunks + chunk) * each for copy in range(call.copies))
            rows[area] = (*rows.get(area, ()), *(row for start in starts for row in range(start, start + each)))
    return rows


def _check_place(call: Call) -> None:
    """Raises AdapterError when it is not known which part of which images a call has."""
    if not (call.known and call.is_placed):
        (height, width), (whole_height, whole_width) = call.size, call.whole
        raise AdapterError(
            f"Record Attention Map: another node samples parts ({call.rows} of {width} x {height}) of the "
            f"{whole_width} x {whole_height} latent, and does not say which. Bypass that node while you look at it."
        )


def _is_range(rows: list[int]) -> bool:
    """Consecutive rows are sliced, without an index tensor that would have to be copied to the device."""
    return rows == list(range(rows[0], rows[-1] + 1)) if rows else False
