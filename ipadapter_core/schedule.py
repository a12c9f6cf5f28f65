"""A weight that changes over the steps of a run, or over the frames of a video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import AdapterError
from .layer_groups import check_factor, entries

Over = Literal["steps", "frames"]
Timing = Literal["linear", "ease in", "ease out", "ease in-out", "custom"]
OVERS: tuple[Over, ...] = get_args(Over)
TIMINGS: tuple[Timing, ...] = get_args(Timing)
LAST = 9999  # as `end`: the last step or frame, whatever their number

# Share of the way -> share of the change. As in ComfyUI_IPAdapter_plus, whose "ease in" begins fast.
CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda way: way,
    "ease in": lambda way: math.sin(way * math.pi / 2),
    "ease out": lambda way: 1 - math.cos(way * math.pi / 2),
    "ease in-out": lambda way: (1 - math.cos(way * math.pi)) / 2,
}


@dataclass(frozen=True)
class WeightSchedule:
    """A factor for each of N steps or frames, from `start` up to, not including, `end`.

    "custom" uses `weights` one by one. The other timings interpolate through all of them, from the first at `start` to
    the last at `end` - 1. Before `start` the first weight is used, after `end` the last. A single step or frame has the
    first.

    Raises AdapterError for weights that are not finite, all 0, or too few for the timing, and for `end` <= `start`.
    """

    over: Over
    weights: tuple[float, ...]
    timing: Timing = "linear"
    start: int = 0
    end: int = LAST

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) for weight in self.weights):
            raise AdapterError(f"weights are {list(self.weights)}. Use finite numbers.")
        if len(self.weights) < (1 if self.timing == "custom" else 2):
            raise AdapterError(
                f"{len(self.weights)} weight{'s' * (len(self.weights) != 1)} for timing {self.timing!r}. Write two "
                "or more, such as 1, 0; or one for each step or frame with timing 'custom'."
            )
        if not any(self.weights):
            raise AdapterError(
                "All weights of the schedule are 0, so the image prompt would never act. Write one that is not, or "
                "disconnect Weight Schedule and set weight to 0."
            )
        if not 0 <= self.start < self.end:
            raise AdapterError(f"start {self.start} is not below end {self.end}. Change one of them.")

    def factors(self, count: int) -> tuple[float, ...]:
        """The factor of each of `count` steps or frames."""
        if count == 1:
            return self.weights[:1]
        end = max(min(self.end, count), self.start + 1)
        return tuple(self._factor(min(index, end - 1), end) for index in range(count))

    def _factor(self, index: int, end: int) -> float:
        last = len(self.weights) - 1
        if index < self.start:
            return self.weights[0]
        if self.timing == "custom":
            return self.weights[min(index - self.start, last)]
        steps = end - self.start - 1
        at = CURVES[self.timing]((index - self.start) / steps if steps else 1.0) * last
        before = min(int(at), last - 1)
        share = at - before
        return self.weights[before] * (1 - share) + self.weights[before + 1] * share

    def notes(self, count: int) -> Iterator[str]:
        """Warnings for what has no effect in a run of `count` steps or frames."""
        listed, there = len(self.weights), min(self.end, count) - self.start
        if count <= self.start:
            yield f"Weight Schedule starts at {self.start}, and there are {count} {self.over}: all get the first."
        elif self.timing == "custom" and listed > there:
            yield f"Weight Schedule has {listed} weights for {there} {self.over}: the first {there} act."
        elif self.timing == "custom" and 1 < listed < there:
            yield f"Weight Schedule has {listed} weights for {there} {self.over}: the last one is kept."
        if not any(self.factors(count)):
            yield f"Weight Schedule is 0 in all {count} {self.over}, so the image prompt does not act."


def parse_weights(text: str, name: str = "weights") -> tuple[float, ...]:
    """Numbers separated by commas or newlines. `name` is that of the input, for messages.

    Raises AdapterError for an entry that is no finite number, or beyond `MOST_FACTOR`.
    """
    weights: list[float] = []
    for place, entry in entries(text):
        try:
            weights.append(float(entry))
        except ValueError:
            weights.append(math.nan)
        if not math.isfinite(weights[-1]):
            raise AdapterError(f"{name}: entry {place}, {entry!r}, is not a number. Write for example 1.0, 0.5, 0.0.")
        check_factor(weights[-1], f"{name}: entry {place}, {entry!r},")
    return tuple(weights)


def step_at(sigmas: Sequence[float], sigma: float) -> int:
    """The step whose sigma is nearest: samplers of higher order also call the model between steps. `sigmas` has the
    start of each step, and the end of the last.
    """
    return min(range(max(len(sigmas) - 1, 1)), key=lambda step: abs(sigmas[step] - sigma))
