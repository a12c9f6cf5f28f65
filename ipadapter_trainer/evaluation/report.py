"""The result of an evaluation: mean scores with their standard errors, and the table of the paper."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..settings.eval_config import EvalConfig
from .clip import ClipModel, clip_t
from .prompts import Prompts
from .scores import Score

# Table 1 of arXiv 2308.06721: method, trainable parameters in millions, CLIP-T, CLIP-I.
PAPER_SOURCE = "arXiv 2308.06721, table 1: COCO val2017, 4 images each, CLIP ViT-L/14"
PAPER_TABLE = (
    ("Open unCLIP", 893, 0.608, 0.858),
    ("Kandinsky-2-1", 1229, 0.599, 0.855),
    ("Versatile Diffusion", 860, 0.587, 0.830),
    ("SD Image Variations", 860, 0.548, 0.760),
    ("SD unCLIP", 870, 0.584, 0.810),
    ("Uni-ControlNet (Global)", 47, 0.506, 0.736),
    ("T2I-Adapter (Style)", 39, 0.485, 0.648),
    ("ControlNet Shuffle", 361, 0.421, 0.616),
    ("IP-Adapter", 22, 0.588, 0.828),
)
PAPER_SETTINGS = {"num_images_per_prompt": 4, "text": "none", "num_inference_steps": 50, "guidance_scale": 7.5}
_TITLE, _TRAINABLE, _NUMBER = 34, 10, 17  # column widths

Value = Callable[[Score], float | None]


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its standard error, None for a single prompt.

    The images of one prompt are correlated, so the sample size is the number of prompts.
    """

    value: float
    error: float | None


@dataclass(frozen=True)
class Row:
    """A row of the table. CLIP-T is None if no prompt has a caption."""

    method: str
    clip_t: Mean | None
    clip_i: Mean | None
    weight: float | None = None


@dataclass(frozen=True)
class Gain:
    """Mean difference between a weight and a baseline on the same prompts."""

    weight: float
    over: str
    clip_t: Mean | None
    clip_i: Mean | None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. `differs` lists what differs from the paper's protocol; `skipped` has an error message
    for each prompt that cannot be read.
    """

    title: str
    clip: str
    settings: Mapping[str, Any]
    parameters: int  # of the adapter
    prompts: int
    images: int  # per weight
    rows: Sequence[Row]
    gains: Sequence[Gain]
    differs: Sequence[str]
    notes: Sequence[str]
    skipped: Sequence[str]
    grid: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields and the table of the paper."""
        keys = ("method", "millions", "clip_t", "clip_i")
        table = [dict(zip(keys, row, strict=True)) for row in PAPER_TABLE]
        return {**asdict(self), "paper": {"source": PAPER_SOURCE, "rows": table}}

    def as_text(self) -> str:
        """The table as text."""
        lines = [self.title, f"Measured with {self.clip}", "", _line("", "trainable", "CLIP-T", "CLIP-I")]
        for row in self.rows:
            trainable = f"{self.parameters / 1e6:.3g} M" if row.weight else ""
            lines.append(_line(row.method, trainable, _number(row.clip_t), _number(row.clip_i)))
        for gain in self.gains:
            change = [_number(mean, "+.3f") for mean in (gain.clip_t, gain.clip_i)]
            lines.append(_line(f"weight {gain.weight:g} over {gain.over}", "", *change))
        lines += ["", f"From the paper ({PAPER_SOURCE})"]
        lines += [_line(name, f"{millions} M", f"{t:.3f}", f"{i:.3f}") for name, millions, t, i in PAPER_TABLE]
        lines.append("")
        if self.differs:
            lines.append(f"Not comparable with the paper's numbers: {'; '.join(self.differs)}.")
        else:
            lines.append(
                "Settings as in the paper. It does not state which caption of an image it uses, nor whether it is "
                'prefixed with "A photo depicts" as in CLIPScore.'
            )
        lines += self.notes
        if self.skipped:
            lines.append(f"Skipped prompts that cannot be read: {len(self.skipped):,}, such as {self.skipped[0]}")
        if self.grid is not None:
            lines.append(f"Images: {self.grid}")
        return "\n".join(lines)


def mean_over_prompts(scores: Iterable[Score], value: Value) -> Mean | None:
    """The mean over prompts of the mean over the images of each; None values are left out."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for score in scores:
        measured = value(score)
        if measured is not None:
            by_prompt[score.index].append(measured)
    return mean_of([statistics.fmean(values) for values in by_prompt.values()])


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean and its standard error; None without values."""
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)


def rows_of(prompts: Prompts, scores: Sequence[Score], weights: Sequence[float]) -> list[Row]:
    """The image prompts, then each weight and, except for weight 0, the same images scored with another prompt."""
    prompt_scores = [
        float(clip_t(prompt.image_embed, prompt.text_embed))
        for prompt in prompts.by_index.values()
        if prompt.text_embed is not None
    ]
    rows = [Row("image prompts", mean_of(prompt_scores), Mean(1.0, None))]
    for weight in weights:
        of_weight = [score for score in scores if score.weight == weight]
        clip_t_mean = mean_over_prompts(of_weight, lambda score: score.clip_t)
        clip_i_mean = mean_over_prompts(of_weight, lambda score: score.clip_i)
        title = f"weight {weight:g}" if weight else "weight 0: no image prompt"
        rows.append(Row(title, clip_t_mean, clip_i_mean, weight))
        if weight:
            clip_t_mean = mean_over_prompts(of_weight, lambda score: score.other_clip_t)
            clip_i_mean = mean_over_prompts(of_weight, lambda score: score.other_clip_i)
            rows.append(Row(f"weight {weight:g} vs. another prompt", clip_t_mean, clip_i_mean))
    return rows


def gains_of(scores: Sequence[Score], weights: Sequence[float]) -> list[Gain]:
    """Each weight over weight 0 with the same seeds, if that has scores, and over another prompt."""
    zero = {(score.index, score.number): score for score in scores if score.weight == 0}
    gains: list[Gain] = []
    for weight in filter(None, weights):
        of_weight = [score for score in scores if score.weight == weight]
        if zero:
            clip_t_gain = mean_over_prompts(of_weight, lambda s: _less(s.clip_t, zero[s.index, s.number].clip_t))
            clip_i_gain = mean_over_prompts(of_weight, lambda s: _less(s.clip_i, zero[s.index, s.number].clip_i))
            gains.append(Gain(weight, "weight 0", clip_t_gain, clip_i_gain))
        clip_t_gain = mean_over_prompts(of_weight, lambda s: _less(s.clip_t, s.other_clip_t))
        clip_i_gain = mean_over_prompts(of_weight, lambda s: _less(s.clip_i, s.other_clip_i))
        gains.append(Gain(weight, "another prompt", clip_t_gain, clip_i_gain))
    return gains


def differences(config: EvalConfig, clip: ClipModel, coco: bool, family: str) -> list[str]:
    """What differs from the paper's protocol. `coco`: the prompts are all of COCO val2017."""
    found = []
    if not clip.is_vit_l:
        found.append(f"CLIP is {clip.name}, not OpenAI's CLIP ViT-L/14")
    if not coco:
        found.append("the prompts are not the 5,000 of COCO val2017")
    if family != "sd15":
        found.append("the base model is not of the SD1.5 family")
    for key, paper in PAPER_SETTINGS.items():
        if (value := getattr(config, key)) != paper:
            found.append(f"{key} is {value}, not {paper}")
    return found


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _number(mean: Mean | None, form: str = ".3f") -> str:
    if mean is None:
        return "-"
    return f"{mean.value:{form}}" + ("" if mean.error is None else f" ± {mean.error:.3f}")


def _line(title: str, trainable: str, clip_t: str, clip_i: str) -> str:
    numbers = f"{clip_t:>{_NUMBER}}{clip_i:>{_NUMBER}}"
    return f"{'' if not title else '  ' + title:<{_TITLE}}{trainable:>{_TRAINABLE}}{numbers}"
