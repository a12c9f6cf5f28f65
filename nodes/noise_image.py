"""NoiseImage: an image of noise, for the negative."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..ipadapter_core.image_prompt import crop_image
from ..ipadapter_core.noise import NOISES, noise_image
from .node import Node
from .types import node_schema


class NoiseImage(Node):
    """An image, or none -> the same with noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="NoiseImage",
            display_name="Noise Image",
            description="Makes a noise image for image_negative of Encode Image Prompt. Results become cleaner and "
            "richer in contrast.",
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "noise",
                    options=list(NOISES),
                    default="fade",
                    tooltip="fade mixes the image with noise, dissolve replaces some of its values, gaussian adds "
                    "noise. shuffle turns the image upside down, tears it and adds noise: try it with an image.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much noise. Try 0.3 to 0.7 with an image, 1 without.",
                ),
                io.Int.Input(
                    "blur",
                    default=0,
                    min=0,
                    max=32,
                    tooltip="Width of the blur in pixels; 0 is off. Try 3 to 15 for noise of a coarser grain.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same noise.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The image that noise is added to, such as the prompt's image. Black if not connected.",
                ),
                io.Int.Input(
                    "size",
                    default=224,
                    min=64,
                    max=1024,
                    step=2,
                    optional=True,
                    tooltip="Width and height. Use the encoder's resolution, so that the noise is not resized: 224 "
                    "for most, 336 for Kolors.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="Connect to image_negative of Encode Image Prompt.")
            ],
        )

    @classmethod
    def execute(
        cls, noise: str, strength: float, blur: int, seed: int, image: Tensor | None = None, size: int = 224
    ) -> io.NodeOutput:
        start = torch.zeros(1, size, size, 3) if image is None else crop_image(image, size)
        noisy = noise_image(start.cpu(), noise, strength, blur, torch.Generator().manual_seed(seed))
        return io.NodeOutput(noisy, ui=ui.PreviewImage(noisy, cls=cls))
