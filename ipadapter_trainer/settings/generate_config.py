"""The settings of `ipadapter generate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from .fields import (
    GuidanceScale,
    ModelConfig,
    NumInferenceSteps,
    Shortcut,
    Size,
)


class GenerateConfig(ModelConfig):
    """Images from a text prompt, an image prompt or both."""

    command: ClassVar[str] = "generate"

    # --- Adapter
    adapter: Path | None = Field(
        None, description="Adapter file, or the output folder of a training; default: the base model alone."
    )
    shortcut: Shortcut = None

    # --- Prompts
    image: Path | None = Field(None, description="Image prompt.")
    face_embeds: Path | None = Field(
        None,
        description="For the faceid and portrait kinds: a .npy, .safetensors or torch file with one face embedding.",
    )
    prompt: str = Field("", description="Text prompt.")
    negative_prompt: str = Field("", description="Negative text prompt.")

    # --- Sampling
    weight: float = Field(1.0, ge=-10, le=10, description="Weight of the image prompt; 0 ignores it.")
    num_inference_steps: NumInferenceSteps = 20
    guidance_scale: GuidanceScale = 5.0
    seed: int = Field(0, description="Seed of the first image; the next ones use seed + 1, seed + 2, ...")
    size: Size = None
    num_images: int = Field(1, ge=1, le=1000, description="Number of images, generated as one batch.")

    # --- Output
    output: Path = Field(description="Image file to write; with num_images above 1, -1, -2, ... is added to its name.")

    def problems(self) -> Iterable[str]:
        """An image prompt without an adapter, a negative prompt without guidance."""
        if self.adapter is None and (self.image is not None or self.face_embeds is not None):
            given = "image" if self.image is not None else "face_embeds"
            yield f"an image prompt needs an adapter: {given} is set, adapter is missing"
        if self.negative_prompt and self.guidance_scale <= 1:
            yield (
                f"negative_prompt has no effect without guidance, but guidance_scale is {self.guidance_scale:g}; raise "
                "it above 1, or leave negative_prompt out"
            )
