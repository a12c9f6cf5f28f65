"""The table of results: images per second and peak memory, compared with the original's, and which bars are met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from training_child import Measured
from training_runs import ORIGINAL, Contender, Setup

HEADINGS = (
    *("", "images/s cpu", "wall", "cpu, x original", "wall, x original", "peak MB", "of original", "ready s"),
    *("bar", "met"),
)
FIGURES = range(1, 8)  # columns


@dataclass(frozen=True)
class Bar:
    """At least `speed` times the original's images a second, at no more than `memory` of its peak."""

    speed: float
    memory: float | None = None

    def __str__(self) -> str:
        text = f">= {self.speed:g} x"
        return text if self.memory is None else f"{text}, <= {self.memory:g} of the memory"


# By device, and with the cache or without.
BARS: Mapping[tuple[str, bool], Bar] = {
    ("cpu", True): Bar(1.5),
    ("cuda", True): Bar(3.0, 0.5),
    ("cuda", False): Bar(1.8, 0.5),
}


@dataclass(frozen=True)
class Row:
    """One contender: medians over the rounds, and medians of the ratios within a round.

    `cpu` uses the CPU time of the process, which other programs on the machine disturb less than `wall`. Bars apply to
    CPU time on a CPU, and to wall time on a GPU. MB are 10^6 bytes; `peak_used_mb` is the peak that tensors used, on a
    GPU. `ready` is the time until the end of the warm-up, in seconds.
    """

    name: str
    cpu: float
    wall: float
    peak_mb: float
    peak_used_mb: float | None
    mean_loss: float
    ready: float = 0.0
    cpu_ratio: float | None = None
    wall_ratio: float | None = None
    memory_ratio: float | None = None
    bar: Bar | None = None
    judged_by: str = "cpu"

    @property
    def met(self) -> bool | None:
        """None when there is no bar, or no original to judge by."""
        speed = self.cpu_ratio if self.judged_by == "cpu" else self.wall_ratio
        if self.bar is None or speed is None or self.memory_ratio is None:
            return None
        return speed >= self.bar.speed and (self.bar.memory is None or self.memory_ratio <= self.bar.memory)

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        verdict = {True: "yes", False: "NO", None: "-" if self.bar else ""}[self.met]
        figures = (self.cpu, self.wall, self.cpu_ratio, self.wall_ratio)
        return (
            self.name,
            *("" if figure is None else f"{figure:.2f}" for figure in figures),
            f"{self.peak_mb:,.0f}",
            "" if self.memory_ratio is None else f"{self.memory_ratio:.2f}",
            f"{self.ready:.1f}",
            "" if self.bar is None else str(self.bar),
            verdict,
        )

    def as_json(self) -> dict[str, object]:
        """All fields and the verdict."""
        return {**asdict(self), "met": self.met}


def rows_of(
    found: Mapping[str, Sequence[Measured]], contenders: Sequence[Contender], setup: Setup, *, judged: bool
) -> list[Row]:
    """One row for each contender that ran; `with `judged`, the bars apply to this size."""
    reference = found.get(ORIGINAL)
    ran = [contender for contender in contenders if contender.name in found]
    return [_row(contender, found[contender.name], reference, setup, judged) for contender in ran]


def render(rows: Sequence[Row]) -> str:
    """The table as text; names to the left, figures to the right."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    shown = [
        "  ".join(
            cell.rjust(width) if column in FIGURES else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _row(
    contender: Contender, runs: Sequence[Measured], reference: Sequence[Measured] | None, setup: Setup, judged: bool
) -> Row:
    barred = contender.name != ORIGINAL and not contender.extra
    used = [run.peak_used for run in runs if run.peak_used is not None]
    row = Row(
        contender.name,
        cpu=statistics.median(setup.images / run.cpu_seconds for run in runs),
        wall=statistics.median(setup.images / run.wall_seconds for run in runs),
        peak_mb=statistics.median(run.peak for run in runs) / 1e6,
        peak_used_mb=statistics.median(used) / 1e6 if used else None,
        mean_loss=statistics.mean(loss for run in runs for loss in run.losses),
        ready=statistics.median(run.ready_seconds for run in runs),
        judged_by="wall" if setup.device == "cuda" else "cpu",
        bar=BARS.get((setup.device, contender.cached)) if judged and barred else None,
    )
    if reference is None:
        return row
    pairs = list(zip(runs, reference, strict=False))  # one that failed later, or an extra one, has fewer
    ratios = {
        "cpu_ratio": statistics.median(base.cpu_seconds / run.cpu_seconds for run, base in pairs),
        "wall_ratio": statistics.median(base.wall_seconds / run.wall_seconds for run, base in pairs),
        "memory_ratio": statistics.median(run.peak / base.peak for run, base in pairs),
    }
    return Row(**{**row.__dict__, **ratios})
