"""The result of an evaluation: means with their errors, controls, and the paper's table beside them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .clip import ClipModel, clip_t
from .data import Prompts
from .scores import Score
from .settings import EvalSettings

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
PAPER_SETTINGS = {"images_per_caption": 4, "text": "none", "steps": 50, "guidance": 7.5}
_TITLE, _TRAINABLE, _NUMBER = 34, 10, 17  # characters of the columns

Value = Callable[[Score], float | None]


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, and its standard error; None from one prompt alone.

    The images of one prompt are alike, so the error counts prompts, not images.
    """

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Row:
    """A line of the table. CLIP-T is None where no prompt has a caption."""

    method: str
    clip_t: Mean | None
    clip_i: Mean | None
    weight: float | None = None


@dataclass(frozen=True)
class Gain:
    """How much higher the adapter scores than a control, prompt by prompt."""

    weight: float
    over: str
    clip_t: Mean | None
    clip_i: Mean | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `differs` says what keeps the numbers from being compared with the paper's; `notes` what
    else to know. `skipped` prompts could not be read.
    """

    title: str
    clip: str
    settings: Mapping[str, Any]
    parameters: int  # of the adapter
    prompts: int
    images: int  # generated for each weight
    rows: Sequence[Row]
    gains: Sequence[Gain]
    differs: Sequence[str]
    notes: Sequence[str]
    skipped: Sequence[str]
    grid: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Every field and the paper's table."""
        keys = ("method", "millions", "clip_t", "clip_i")
        table = [dict(zip(keys, row, strict=True)) for row in PAPER_TABLE]
        return {**asdict(self), "paper": {"source": PAPER_SOURCE, "rows": table}}

    def as_text(self) -> str:
        """The table for people."""
        lines = [self.title, f"Measured with {self.clip}", "", _line("", "trainable", "CLIP-T", "CLIP-I")]
        for row in self.rows:
            trainable = f"{self.parameters / 1e6:.3g} M" if row.weight else ""
            lines.append(_line(row.method, trainable, _shown(row.clip_t), _shown(row.clip_i)))
        for gain in self.gains:
            change = [_shown(mean, "+.3f") for mean in (gain.clip_t, gain.clip_i)]
            lines.append(_line(f"weight {gain.weight:g} over {gain.over}", "", *change))
        lines += ["", f"The paper ({PAPER_SOURCE})"]
        lines += [_line(name, f"{millions} M", f"{t:.3f}", f"{i:.3f}") for name, millions, t, i in PAPER_TABLE]
        lines.append("")
        if self.differs:
            lines.append(f"Not to be compared with the paper's numbers: {'; '.join(self.differs)}.")
        else:
            lines.append(
                "Settings as in the paper, which does not say which of the captions it takes, nor whether CLIPScore's "
                '"A photo depicts" stands before them.'
            )
        lines += self.notes
        if self.skipped:
            lines.append(f"Skipped, as they cannot be read: {len(self.skipped):,}, such as {self.skipped[0]}")
        if self.grid is not None:
            lines.append(f"Images: {self.grid}")
        return "\n".join(lines)


def mean_over_prompts(scores: Iterable[Score], value: Value) -> Mean | None:
    """The mean over prompts of the means over each one's images, without those that have no such value."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for score in scores:
        measured = value(score)
        if measured is not None:
            by_prompt[score.index].append(measured)
    return mean_of([statistics.fmean(values) for values in by_prompt.values()])


def mean_of(values: Sequence[float]) -> Mean | None:
    """Their mean and its standard error; None of none."""
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)


def rows_of(prompts: Prompts, scores: Sequence[Score], weights: Sequence[float]) -> list[Row]:
    """The prompts themselves, then each weight and, where the image counts, the same images beside other prompts."""
    own = [
        float(clip_t(prompt.image_embed, prompt.text_embed))
        for prompt in prompts.chosen.values()
        if prompt.text_embed is not None
    ]
    rows = [Row("the prompts themselves", mean_of(own), Mean(1.0, None))]
    for weight in weights:
        of = [score for score in scores if score.weight == weight]
        title = f"weight {weight:g}" if weight else "weight 0: no image prompt"
        rows.append(
            Row(
                title,
                mean_over_prompts(of, lambda score: score.clip_t),
                mean_over_prompts(of, lambda score: score.clip_i),
                weight,
            )
        )
        if weight:
            rows.append(
                Row(
                    f"weight {weight:g} beside another prompt",
                    mean_over_prompts(of, lambda score: score.other_clip_t),
                    mean_over_prompts(of, lambda score: score.other_clip_i),
                )
            )
    return rows


def gains_of(scores: Sequence[Score], weights: Sequence[float]) -> list[Gain]:
    """Each weight over weight 0, where that was measured, with the same seeds; and over another prompt."""
    zero = {(score.index, score.number): score for score in scores if score.weight == 0}
    gains: list[Gain] = []
    for weight in filter(None, weights):
        of = [score for score in scores if score.weight == weight]
        if zero:
            gains.append(
                Gain(
                    weight,
                    "weight 0",
                    mean_over_prompts(of, lambda s: _less(s.clip_t, zero[s.index, s.number].clip_t)),
                    mean_over_prompts(of, lambda s: _less(s.clip_i, zero[s.index, s.number].clip_i)),
                )
            )
        gains.append(
            Gain(
                weight,
                "another prompt",
                mean_over_prompts(of, lambda s: _less(s.clip_t, s.other_clip_t)),
                mean_over_prompts(of, lambda s: _less(s.clip_i, s.other_clip_i)),
            )
        )
    return gains


def differences(settings: EvalSettings, clip: ClipModel, coco: bool, family: str) -> list[str]:
    """What is not as in the paper; `coco` says whether the prompts are the whole of COCO val2017."""
    found = []
    if not clip.is_vit_l:
        found.append(f"the measuring CLIP is {clip.name}, not OpenAI's CLIP ViT-L/14")
    if not coco:
        found.append("the prompts are not the 5,000 of COCO val2017")
    if family != "sd15":
        found.append("the base model is not of the SD1.5 family")
    for name, theirs in PAPER_SETTINGS.items():
        ours = getattr(settings, name)
        if ours != theirs:
            shown = f"{ours:g}" if isinstance(ours, float) else ours
            found.append(f"{name.replace('_', ' ')} {shown}, not {theirs}")
    return found


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _shown(mean: Mean | None, form: str = ".3f") -> str:
    if mean is None:
        return "-"
    return f"{mean.value:{form}}" + ("" if mean.error is None else f" ± {mean.error:.3f}")


def _line(title: str, trainable: str, clip_t: str, clip_i: str) -> str:
    numbers = f"{clip_t:>{_NUMBER}}{clip_i:>{_NUMBER}}"
    return f"{'' if not title else '  ' + title:<{_TITLE}}{trainable:>{_TRAINABLE}}{numbers}"
