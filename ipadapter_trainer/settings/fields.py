"""Fields that several commands share, and how all settings are validated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

LIST_SUFFIXES = (".json", ".jsonl", ".csv")  # data that are a list of file names


class Config(BaseModel):
    """Settings of a command: frozen, with `~` expanded in every value.

    `command` is the command whose --options lists the keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    command: ClassVar[str]

    def problems(self) -> Iterable[str]:
        """Settings that exclude each other, each as a clause that says what to do."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {
            key: str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
            for key, value in values.items()
        }

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))
        return self


class ModelConfig(Config):
    """Settings with the frozen models: base model and image encoder."""

    base_model: Path = Field(
        description="Base model (SD1.5, SD2 or SDXL): a diffusers folder, a Hub id such as "
        "stable-diffusion-v1-5/stable-diffusion-v1-5, or a .safetensors checkpoint."
    )
    base_config: Path | None = Field(
        None,
        description="For a single-file base_model: a diffusers folder of the same family with the configs and "
        "tokenizers; default: downloaded by diffusers.",
    )
    image_encoder: Path | None = Field(
        None,
        description="Image encoder (CLIPVisionModelWithProjection): a folder, a .safetensors file, or a Hub id such as "
        "h94/IP-Adapter/models/image_encoder; default: image_encoder inside base_model. Not used by faceid and "
        "portrait adapters.",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None,
        description="Prediction type of the base model; default: from the scheduler config. Needed for a single-file "
        "base_model without that information.",
    )


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "832x1216" (width x height) -> (height, width). Raises ValueError for another text."""
    match = re.fullmatch(r"(\d+)(?:\s*[xX]\s*(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"size = {text!r}: expected a side or WIDTHxHEIGHT in pixels, such as 512 or 832x1216")
    width = int(match[1])
    return int(match[2] or width), width


def _size_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value  # TOML: size = 512


def _check_size(value: str | None) -> str | None:
    if value is not None:
        parse_size(value)
    return value


DataRoot = Annotated[
    Path | None, Field(description="Folder that the file names in a list are relative to; default: the list's folder.")
]


def check_data_root(data: str | Path, data_root: Path | None) -> Iterator[str]:
    """A problem if `data_root` is given and `data` is no list, so that it would have no effect."""
    if data_root is not None and Path(data).suffix.lower() not in LIST_SUFFIXES:
        yield f"data_root is for .json, .jsonl and .csv lists, but data is {str(data)!r}"


FaceTable = Annotated[
    Path | None,
    Field(
        description="For the faceid and portrait kinds: a .safetensors or .npz file with one face embedding per image, "
        "keyed by file name."
    ),
]
Shortcut = Annotated[
    bool | None,
    Field(
        description="For a faceid-plus adapter file without this metadata: true for FaceID-Plus v2, false for v1; "
        "default: from the file name."
    ),
]
NumInferenceSteps = Annotated[int, Field(ge=1, le=1000, description="DDIM steps.")]
GuidanceScale = Annotated[float, Field(ge=0, le=100, description="Classifier-free guidance scale; 1 turns it off.")]
Size = Annotated[
    str | None,
    BeforeValidator(_size_text),
    AfterValidator(_check_size),
    Field(description="Side, or WIDTHxHEIGHT, in pixels; default: the base model's resolution."),
]
