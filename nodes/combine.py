"""CombineImagePrompts: several image prompts -> one."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core.image_prompt import COMBINES
from .node import Node
from .prompt_math import combine_prompts
from .types import ImagePrompt, ImagePromptType, node_schema

_NUMBERS = range(1, 6)


class CombineImagePrompts(Node):
    """Two to five image prompts, each with its weight -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        prompts = [
            ImagePromptType.Input(
                f"image_prompt_{number}",
                optional=number > 2,
                tooltip=f"Image prompt {number}, for the same adapter.",
            )
            for number in _NUMBERS
        ]
        weights = [
            io.Float.Input(
                f"weight_{number}",
                default=1.0,
                min=-1.0,
                max=3.0,
                step=0.05,
                optional=True,
                tooltip=f"Strength of image_prompt_{number}. Try 0.5 to 1; it multiplies the prompt's own weight.",
            )
            for number in _NUMBERS
        ]
        combine = io.Combo.Input(
            "combine",
            options=list(COMBINES),
            default="concat",
            tooltip="concat keeps the tokens of all images, each with its weight: start with it. The others multiply "
            "the features by their weights and compute one set of features (subtract: the first minus the mean of "
            "the others).",
        )
        return node_schema(
            node_id="CombineImagePrompts",
            display_name="Combine Image Prompts",
            description="Combines two to five image prompts for the same adapter, each with its own weight.",
            inputs=[*prompts, combine, *weights],
            outputs=[ImagePromptType.Output(display_name="image_prompt", tooltip="Connect to Apply IP Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        image_prompt_1: ImagePrompt,
        image_prompt_2: ImagePrompt,
        combine: str = "concat",
        image_prompt_3: ImagePrompt | None = None,
        image_prompt_4: ImagePrompt | None = None,
        image_prompt_5: ImagePrompt | None = None,
        weight_1: float = 1.0,
        weight_2: float = 1.0,
        weight_3: float = 1.0,
        weight_4: float = 1.0,
        weight_5: float = 1.0,
    ) -> io.NodeOutput:
        prompts = (image_prompt_1, image_prompt_2, image_prompt_3, image_prompt_4, image_prompt_5)
        weights = (weight_1, weight_2, weight_3, weight_4, weight_5)
        named = {
            f"image_prompt_{number}": prompt.weighted(weights[number - 1])
            for number, prompt in enumerate(prompts, start=1)
            if prompt is not None
        }
        return io.NodeOutput(combine_prompts(named, combine))
