"""Fields that several commands share, and how all settings are validated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from typing_extensions import Self

LIST_SUFFIXES = (".json", ".jsonl", ".csv")  # data that are a list of file names

_path_as_text = BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
PathOrUrl = Annotated[str, _path_as_text]


class Config(BaseModel):
    """Settings of a command: frozen, in UTF-8, with `~` expanded in paths.

    `command` is the command whose --options lists the keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    command: ClassVar[str]

    def problems(self) -> Iterable[str]:
        """Settings that exclude each other, each as a clause that says what to do."""
        return ()

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        is_path = _is_path(cls.model_fields[name])
        if isinstance(value, str | Path) and str(value).encode("utf-8", "ignore").decode() != str(value):
            wanted = "path in UTF-8; rename it, or choose another" if is_path else "text in UTF-8"
            raise ValueError(f"{name} = {str(value)!r}: expected a {wanted}")
        return _expanded(name, value) if is_path and isinstance(value, str) else value

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


def _is_path(field: FieldInfo) -> bool:
    return Path in (field.annotation, *get_args(field.annotation)) or _path_as_text in field.metadata


def _expanded(name: str, path: str) -> str:
    """The path with `~` expanded. Raises ValueError for one that no file has."""
    if "\0" in path:
        raise ValueError(f"{name} = {path!r}: expected a path, which holds no zero bytes")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = Path(path).parts[0][1:]
        found = f"no such user as {user!r}" if user else "the home folder is not known"
        raise ValueError(f"{name} = {path!r}: {found}; write ./{path} for a file of this name") from None


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
