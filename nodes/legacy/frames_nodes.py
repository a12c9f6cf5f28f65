"""The old nodes around weights by frame. A list of weights travels on a FLOAT wire."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...ipadapter_core import AdapterError
from ...ipadapter_core.schedule import CURVES
from . import fields as f
from .inputs import read_number
from .old_node import OldNode, WeightsStrategy

_TIMINGS = ["custom", "linear", "ease_in_out", "ease_in", "ease_out", "random"]
_CURVES = {name.replace(" ", "_").replace("-", "_"): curve for name, curve in CURVES.items()}
_METHODS = ["full batch", "shift batches", "alternate batches"]
_MOST = 9999


class IPAdapterWeights(OldNode):
    TITLE = "IPAdapter Weights"
    REPLACED_BY = "Weight Schedule"
    FUNCTION = "weights"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            io.String.Input("weights", default="1.0, 0.0", multiline=True),
            f.choice("timing", _TIMINGS, "linear"),
            f.whole("frames", 0, 0, _MOST, 1),
            f.whole("start_frame", 0, 0, _MOST, 1),
            f.whole("end_frame", _MOST, 0, _MOST, 1),
            f.whole("add_starting_frames", 0, 0, _MOST, 1),
            f.whole("add_ending_frames", 0, 0, _MOST, 1),
            f.choice("method", _METHODS, "full batch"),
            f.image("image", optional=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [
            io.Float.Output(display_name="weights"),
            io.Float.Output(display_name="weights_invert"),
            io.Int.Output(display_name="total_frames"),
            io.Image.Output(display_name="image_1"),
            io.Image.Output(display_name="image_2"),
            WeightsStrategy.Output(display_name="weights_strategy"),
        ]

    @classmethod
    def weights(
        cls,
        weights: str = "",
        timing: str = "custom",
        frames: int = 0,
        start_frame: int = 0,
        end_frame: int = _MOST,
        add_starting_frames: int = 0,
        add_ending_frames: int = 0,
        method: str = "full batch",
        weights_strategy: dict[str, Any] | None = None,
        image: Tensor | None = None,
    ) -> tuple[Any, ...]:
        strategy = weights_strategy or {
            "weights": weights,
            "timing": timing,
            "frames": frames,
            "start_frame": start_frame,
            "end_frame": end_frame,
            "add_starting_frames": add_starting_frames,
            "add_ending_frames": add_ending_frames,
            "method": method,
            "frame_count": 0 if image is None else len(image),
        }
        curve = _curve(strategy)
        first = second = None
        if image is not None:
            curve, first, second = _cross_fade(image, curve, strategy["method"])
            first = _extend(first, image, strategy)
            second = _extend(second, image, strategy)
            before, after = strategy["add_starting_frames"], strategy["add_ending_frames"]
            curve = curve[:1] * before + curve + curve[-1:] * after
        return curve, curve[::-1], len(curve), first, second, strategy


def _curve(strategy: dict[str, Any]) -> list[float]:
    """The weights of one image, frame by frame."""
    listed = [_number(text) for text in strategy["weights"].replace("\n", ",").split(",") if text.strip()]
    timing = strategy["timing"]
    if timing == "custom":
        return listed or [0.0]
    frames = max(strategy["frames"], 2)
    start, end = (listed[0], listed[-1]) if listed else (0.0, 1.0)
    first, last = strategy["start_frame"], min(strategy["end_frame"], frames)
    steps = last - first - 1
    curve = [start] * first
    for index in range(steps + 1):
        if timing == "random":
            curve.append(random.uniform(start, end))
        else:
            curve.append(start + (end - start) * _CURVES[timing](index / steps if steps else 1.0))
    if not curve:
        return [end] * frames
    if timing != "random":
        curve[-1] = end
    return curve + [end] * (frames - last)


def _number(text: str) -> float:
    try:
        return read_number(text)
    except ValueError:
        raise AdapterError(
            f"weights: {text.strip()!r} is no number. Use numbers with commas, such as 1.0, 0.5, 0.0."
        ) from None


def _cross_fade(image: Tensor, curve: list[float], method: str) -> tuple[list[float], Tensor, Tensor | None]:
    """The weights of all images, and the image of each frame for two adapters that fade into each other."""
    count = len(curve)
    if len(image) < 2 and method in _METHODS[1:]:
        raise AdapterError(
            f"method {method!r} goes from image to image and needs at least two; image has {len(image)}. Connect more, "
            f"or use {_METHODS[0]!r}."
        )
    if "shift" in method:
        first, second = (half.repeat_interleave(count, 0) for half in (image[:-1], image[1:]))
        return curve * (len(image) - 1), first, second
    if "alternate" in method:
        low, high = min(curve), max(curve)
        wave = curve + [high - (weight - low) for weight in curve]
        first, second = image[::2].repeat_interleave(2, 0)[1:], image[1::2].repeat_interleave(2, 0)
        weights = wave * (len(first) // 2)
        if len(image) % 2:
            first = first[:-1]
        else:
            second = second[:-1]
            weights = weights + curve
        return weights, first.repeat_interleave(count, 0), second.repeat_interleave(count, 0)
    return curve * len(image), image.repeat_interleave(count, 0), None


def _extend(frames: Tensor | None, image: Tensor, strategy: dict[str, Any]) -> Tensor | None:
    """The first image before, and the last one after."""
    if frames is None:
        return None
    before = image[:1].expand(strategy["add_starting_frames"], -1, -1, -1)
    after = image[-1:].expand(strategy["add_ending_frames"], -1, -1, -1)
    return torch.cat([before, frames, after])


class IPAdapterWeightsFromStrategy(IPAdapterWeights):
    TITLE = "IPAdapter Weights From Strategy"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.wire(WeightsStrategy, "weights_strategy"), f.image("image", optional=True)]


class IPAdapterPromptScheduleFromWeightsStrategy(OldNode):
    TITLE = "Prompt Schedule From Weights Strategy"
    REPLACED_BY = "Weight Schedule"
    FUNCTION = "prompt_schedule"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.wire(WeightsStrategy, "weights_strategy"),
            io.String.Input("prompt", default="", multiline=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.String.Output(display_name="prompt_schedule")]

    @classmethod
    def prompt_schedule(cls, weights_strategy: dict[str, Any], prompt: str = "") -> tuple[str]:
        lines = [line for line in prompt.split("\n") if line.strip()]
        count, frames = weights_strategy["frame_count"], weights_strategy["frames"]
        before, after = weights_strategy["add_starting_frames"], weights_strategy["add_ending_frames"]
        if not lines or count <= 0:
            return ("",)
        lines = (lines + lines[-1:] * count)[:count]
        schedule = [(index * frames + before, line) for index, line in enumerate(lines)]
        if before > 0:
            schedule.insert(0, (0, lines[0]))
        if after > 0:
            schedule.append((count * frames + before, lines[-1]))
        return ("".join(f'"{frame}": "{line}",\n' for frame, line in schedule),)


class IPAdapterCombineWeights(OldNode):
    TITLE = "IPAdapter Combine Weights"
    REPLACED_BY = "Weight Schedule"
    FUNCTION = "combine"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.number(name, 0.0, 0.0, 1.0) for name in ("weights_1", "weights_2")]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Float.Output(display_name="weights"), io.Int.Output(display_name="count")]

    @classmethod
    def combine(cls, weights_1: Any, weights_2: Any) -> tuple[list[float], int]:
        both = [part if isinstance(part, list) else [part] for part in (weights_1, weights_2)]
        weights = both[0] + both[1]
        return weights, len(weights)


NODES = [
    IPAdapterWeights,
    IPAdapterCombineWeights,
    IPAdapterWeightsFromStrategy,
    IPAdapterPromptScheduleFromWeightsStrategy,
]
