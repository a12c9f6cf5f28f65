"""The settings of `ipadapter eval`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from .fields import (
    DataRoot,
    FaceTable,
    GuidanceScale,
    ModelConfig,
    NumInferenceSteps,
    Shortcut,
    Size,
    check_data_root,
)


class EvalConfig(ModelConfig):
    """CLIP-I and CLIP-T of an adapter. The defaults are the paper's (arXiv 2308.06721, section 4.2)."""

    command: ClassVar[str] = "eval"

    # --- Adapter and CLIP
    adapter: Path = Field(description="Adapter file, or the output folder of a training.")
    shortcut: Shortcut = None
    clip: Path = Field(
        description="CLIP model for the scores (both encoders): a folder or a Hub id. The paper's: "
        "openai/clip-vit-large-patch14, or `ipadapter models clip-vit-large-patch14 --download`."
    )

    # --- Data
    data: Path = Field(
        description="Image prompts and captions: a folder, a .json, .jsonl or .csv list, or COCO's "
        "captions_val2017.json."
    )
    data_root: DataRoot = None
    face_embeds: FaceTable = None
    limit: int = Field(5000, ge=1, description="Largest number of image prompts; they are drawn with the seed.")
    caption_prefix: str = Field(
        "", description='Text before each caption in CLIP-T; the CLIPScore paper uses "A photo depicts ".'
    )

    # --- Generation
    num_images_per_prompt: int = Field(4, ge=1, description="Images to generate for each image prompt.")
    weights: tuple[Annotated[float, Field(ge=-10, le=10)], ...] = Field(
        (1.0,),
        min_length=1,
        description="Weights of the image prompt, such as 0,0.5,1. With 0 the result also shows how much each weight "
        "adds to the scores of the base model alone.",
    )
    text: Literal["none", "caption"] = Field(
        "none", description="Text prompt: none as in the paper, or the caption of each image."
    )
    num_inference_steps: NumInferenceSteps = 50
    guidance_scale: GuidanceScale = 7.5
    seed: int = Field(0, description="Decides which image prompts are drawn, their order and the noise.")
    size: Size = None
    batch_size: int = Field(8, ge=1, description="Images to generate at once; does not change the result.")

    # --- Output
    output: Path = Field(
        Path("evaluation"), description="Folder of the scores and images; rerun the same command to resume."
    )
    sample_images: int = Field(6, ge=0, description="Image prompts whose images are saved and drawn in a grid.")
    result: Path | None = Field(None, description="JSON file for the result.")

    def problems(self) -> Iterator[str]:
        """Settings that exclude each other."""
        return check_data_root(self.data, self.data_root)

    @property
    def image_root(self) -> Path:
        """The folder that the file names in a list or in a table of face embeddings are relative to."""
        return self.data_root or (self.data if self.data.is_dir() else self.data.parent)

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, value: Any) -> Any:
        """ "0,0.5,1", a number or a list -> each weight once, the lowest first."""
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value
        try:
            return tuple(sorted({float(part) for part in parts}))
        except (TypeError, ValueError):
            raise ValueError(f"weights = {value!r}: expected numbers with commas, such as 0,0.5,1") from None
