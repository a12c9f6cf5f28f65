"""WeightSchedule: an image prompt whose weight changes over the steps, or over the frames of a video."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core import schedule
from ..ipadapter_core.schedule import LAST, OVERS, TIMINGS, Over, Timing, parse_weights
from .node import Node
from .types import WeightScheduleType, node_schema


class WeightSchedule(Node):
    """A text and a timing -> a factor for each step or frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="WeightSchedule",
            display_name="Weight Schedule",
            description="Changes the weight of an image prompt over the steps, or over the frames of a video. "
            "Multiplies the weight of Apply IP Adapter.",
            inputs=[
                io.Combo.Input(
                    "over",
                    options=list(OVERS),
                    default="steps",
                    tooltip="steps: of the sampler, the same for all images. frames: the images of the batch, as in "
                    "AnimateDiff; in context windows each frame keeps its own weight.",
                ),
                io.String.Input(
                    "weights",
                    default="1.0, 0.0",
                    multiline=True,
                    tooltip="Numbers separated by commas or newlines. Try 1, 0 to fade out, or 0, 1, 0 for both.",
                ),
                io.Combo.Input(
                    "timing",
                    options=list(TIMINGS),
                    default="linear",
                    tooltip="How the weight goes from one number to the next. custom: the first number is for the "
                    "first step or frame, the second for the second, and so on.",
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=LAST - 1,
                    optional=True,
                    tooltip="The step or frame at which the first number applies; it also applies to all before.",
                ),
                io.Int.Input(
                    "end",
                    default=LAST,
                    min=1,
                    max=LAST,
                    optional=True,
                    tooltip="The last number is reached before this step or frame, and stays. 9999: the very last.",
                ),
            ],
            outputs=[WeightScheduleType.Output(display_name="weight_schedule", tooltip="Connect to Apply IP Adapter.")],
        )

    @classmethod
    def execute(
        cls, over: Over, weights: str, timing: Timing = "linear", start: int = 0, end: int = LAST
    ) -> io.NodeOutput:
        return io.NodeOutput(schedule.WeightSchedule(over, parse_weights(weights), timing, start, end))
