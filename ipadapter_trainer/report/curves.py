"""The charts of a run's report, drawn from log.jsonl, with an explanation each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .verdict import Lines

POINTS = 1000  # of a curve at most; more are not visible and make the file large
_SMOOTHED = 40  # a curve is averaged over 1/40 of its length
# Okabe and Ito's palette for colour-blind readers.
_BLUE, _ORANGE, _GREY, _BLACK = "#0072b2", "#e69f00", "#999999", "#000000"
_AXES = (0.12, 0.15, 0.85, 0.74)  # left, bottom, width and height as shares of a chart; the legend is above
_BY_NOISE = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `error` is the key of its standard error; two of them are shaded."""

    label: str
    key: str
    colour: str = _BLUE
    dashed: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, from the log lines of training steps or of validations."""

    title: str
    meaning: str
    curves: tuple[Curve, ...]
    of_validation: bool = False
    smooth: bool = False
    from_zero: bool = False


CHARTS = (
    Chart(
        "Training loss",
        "At random timesteps, so it is noisy and falls little; it does not say whether the image prompt is used.",
        (Curve("loss", "loss"),),
        smooth=True,
    ),
    Chart(
        "Validation loss",
        "On held-out images, always with the same noise and timesteps. The lower, the better.",
        (
            Curve("right image", "validation/loss"),
            Curve("another image", "validation/loss_shuffled", _ORANGE),
            Curve("dropped image", "validation/loss_dropped", _GREY),
            Curve("no adapter", "validation/loss_no_image", _BLACK, dashed=True),
        ),
        of_validation=True,
    ),
    Chart(
        "How much the right image prompt helps",
        "How much lower the loss is with it. Where the shade (two standard errors) is above zero, it is used.",
        (
            Curve("than with another one", "validation/gap_shuffled", _ORANGE, error="validation/gap_shuffled_error"),
            Curve("than without adapter", "validation/gap_no_image", _BLACK, dashed=True),
        ),
        of_validation=True,
        from_zero=True,
    ),
    Chart(
        "The same, by the amount of noise",
        "With much noise, the image prompt decides on layout and colour; with little, on details.",
        tuple(
            Curve(f"{name} noise", f"validation/gap_shuffled_t{quarter}", colour)
            for quarter, (name, colour) in enumerate(zip(("least", "less", "more", "most"), _BY_NOISE, strict=True))
        ),
        of_validation=True,
        from_zero=True,
    ),
    Chart(
        "Image attention beside text attention",
        "The ratio of their norms, averaged over all layers: how strong the image prompt is at weight 1.",
        (Curve("ratio", "validation/attention_ratio"),),
        of_validation=True,
        from_zero=True,
    ),
    Chart(
        "Gradient norm",
        "Before clipping. If it grows without end, lower the learning rate.",
        (Curve("norm", "grad_norm"),),
        smooth=True,
        from_zero=True,
    ),
    Chart("Learning rate", "As scheduled.", (Curve("learning rate", "learning_rate"),), from_zero=True),
    Chart(
        "Images a second",
        "Of all processes, validation not counted.",
        (Curve("images a second", "images_per_second"),),
        from_zero=True,
    ),
)


def draw(chart: Chart, train: Lines, validations: Lines) -> bytes | None:
    """The chart as SVG, without its title; None if the log has no data for it."""
    lines = validations if chart.of_validation else train
    if not any(curve.key in line for curve in chart.curves for line in lines):
        return None
    from matplotlib.figure import Figure

    # Fixed margins: matplotlib's layout engines draw every chart a second time to measure it.
    figure = Figure(figsize=(6, 3.2))
    axes: Any = figure.add_axes(_AXES)
    for curve in chart.curves:
        _plot(axes, curve, [line for line in lines if curve.key in line], chart.smooth)
    if chart.from_zero:
        axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.curves) > 1:
        figure.legend(loc="upper left", ncols=4, fontsize=8, frameon=False, handlelength=1.5)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _plot(axes: Any, curve: Curve, lines: Lines, smooth: bool) -> None:
    if not lines:
        return
    every = -(-len(lines) // POINTS)
    shown = slice((len(lines) - 1) % every, None, every)  # always with the last one
    steps = [line["step"] for line in lines][shown]
    values = [line[curve.key] for line in lines]
    style: dict[str, Any] = {"color": curve.colour, "linestyle": "--" if curve.dashed else "-"}
    if smooth:
        axes.plot(steps, values[shown], color=curve.colour, alpha=0.25, linewidth=0.8)
        values = smoothed(values)
    marker = "o" if len(lines) < 20 else None
    axes.plot(steps, values[shown], label=curve.label, marker=marker, markersize=3, **style)
    errors = [line.get(curve.error, 0.0) for line in lines][shown] if curve.error else []
    if any(errors):
        ends = [[v + s * 2 * e for v, e in zip(values[shown], errors, strict=True)] for s in (-1, 1)]
        axes.fill_between(steps, *ends, color=curve.colour, alpha=0.15, linewidth=0)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over 1/40 of the curve, with Adam's bias correction."""
    decay = 1 - 1 / max(2.0, len(values) / _SMOOTHED)
    average, weight, smooth = 0.0, 0.0, list[float]()
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(average / weight)
    return smooth
