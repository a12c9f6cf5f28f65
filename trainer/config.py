"""The settings of a training: a TOML file, `key=value` overrides, and refusals before anything is loaded."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class TrainConfig(BaseModel):
    """One training. The defaults are the recipe of the IP-Adapter paper (arXiv 2308.06721)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    base_model: Path = Field(
        description="Folder of the base model in the diffusers layout (unet, vae, text_encoder, tokenizer, "
        "scheduler). The adapter fits every fine-tune of the same family, best the one it was trained on."
    )
    data: Path = Field(
        description="Pictures and captions: a folder (picture.png with picture.txt, or a metadata.jsonl), or "
        "a "
        'JSON list [{"image_file": ..., "text": ...}].'
    )
    output: Path = Field(description="Folder of the checkpoints, the log and, at the end, adapter.safetensors.")
    image_encoder: Path | None = Field(
        None,
        description="Folder of a CLIPVisionModelWithProjection; default: image_encoder inside base_model. Users of "
        "the adapter need the same encoder.",
    )
    data_root: Path | None = Field(
        None, description="Folder that file names in a JSON list are relative to; default: the list's folder."
    )
    kind: Literal["base"] = Field(
        "base", description="Kind of adapter. base: a few tokens from the picture's global embedding."
    )
    tokens: int = Field(
        4,
        ge=1,
        description="Image tokens. Most hosts read the number 4 only; another number needs a host of its own.",
    )
    init_from: Path | None = Field(
        None,
        description="An adapter file to start from instead of a new one; choose a learning rate of 1e-5 to 2e-5 with "
        "it.",
    )
    resolution: int = Field(
        512,
        ge=8,
        multiple_of=8,
        description="Side of the training pictures in pixels; use what the base was made for.",
    )
    flip: bool = Field(
        False, description="Mirror half of the pictures: more variety, but lettering and left/right are lost."
    )
    batch_size: int = Field(8, ge=1, description="Pictures that are on the device at once; decides the memory.")
    gradient_accumulation: int = Field(
        1,
        ge=1,
        description="Batches per step: a larger effective batch at no memory, in proportionally more time.",
    )
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps in all, resumed runs counted in. Or give epochs."
    )
    epochs: float | None = Field(None, gt=0, description="Passes over the data in all. Or give steps.")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's learning rate, constant.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Longer gradients are shortened to this, which tames outliers; 0 turns it off."
    )
    text_dropout: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of pictures without caption; guidance and image-only prompts need it.",
    )
    image_dropout: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of pictures with a zeroed embedding; the negative image of guidance.",
    )
    both_dropout: float = Field(0.05, ge=0, le=1, description="Share of pictures without caption and embedding.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no",
        description="no: all in float32. bf16: the frozen base in bfloat16, half the memory and much faster on a "
        "GPU; the adapter stays in float32.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Decides weights, order, dropout and noise: the same seed gives the same adapter.",
    )
    workers: int = Field(4, ge=0, description="Processes that decode pictures; 0 decodes in the training process.")
    save_every: int = Field(1000, ge=1, description="Steps between checkpoints; a crash costs at most these.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints to keep; older ones are deleted.")
    log_every: int = Field(
        10, ge=1, description="Steps between lines of log.jsonl; the loss in a line is the mean over them."
    )
    resume: bool = Field(
        True,
        description="Go on from the newest checkpoint in output. false refuses an output that already has some.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {
                k: str(Path(v).expanduser()) if isinstance(v, str) and v.startswith("~") else v
                for k, v in values.items()
            }
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is given" if self.steps is None else f"steps={self.steps}, epochs={self.epochs} are"
            raise ValueError(f"give either steps or epochs ({given})")
        dropout = self.text_dropout + self.image_dropout + self.both_dropout
        if dropout > 1:
            raise ValueError(
                f"text_dropout + image_dropout + both_dropout is {dropout:g}, but they are shares of one whole (at "
                "most 1)"
            )
        if self.data_root is not None and self.data.suffix not in (".json", ".jsonl"):
            raise ValueError(f"data_root belongs to a .json or .jsonl list, but data is {str(self.data)!r}")
        return self


def load_config(file: Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and `key=value` overrides (an empty value or "none" unsets an optional key).

    Raises ConfigError for a missing or malformed file, and as `make_config` does.
    """
    values: dict[str, Any] = {} if file is None else _read_toml(file)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override. Write key=value, such as steps=1000.")
        values[key.strip()] = value.strip()
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Validate settings by name.

    Raises ConfigError that names an unknown key with the nearest valid one, a missing key, a value of the
    wrong type with the expected type, or settings that exclude each other; all problems at once.
    """
    optional = {name for name, field in TrainConfig.model_fields.items() if field.default is None}
    cleaned = {k: None if k in optional and v in ("", "none") else v for k, v in values.items()}
    try:
        return TrainConfig.model_validate(cleaned)
    except ValidationError as error:
        problems = [_problem(dict(e)) for e in error.errors()]
    text = "; ".join(problems)
    raise ConfigError(text if text.endswith("?") else text + ".")


def options_text() -> str:
    """Every key with its default and meaning, for `ipadapter train --options`."""
    lines: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        default = "required" if field.is_required() else "unset" if field.default is None else f"{field.default!s}"
        lines.append(f"{name} ({default})\n    {field.description}")
    return "\n".join(lines)


def _read_toml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file. Give a .toml file, or only key=value settings.")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML ({error}).") from error


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "path": "a path",
    "string": "text",
}


def _problem(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a clause without a full stop."""
    kind, key = str(error["type"]), ".".join(str(part) for part in error["loc"])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, TrainConfig.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see `ipadapter train --options`"
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"{key} is missing; write {key}=... ({TrainConfig.model_fields[key].description})"
    if kind == "value_error":  # a refused combination
        return str(error["ctx"]["error"])
    context = error.get("ctx", {})
    if kind == "literal_error":
        expected = context["expected"]
    elif kind in ("greater_than_equal", "greater_than", "less_than_equal", "multiple_of"):
        word = {"ge": "at least", "gt": "more than", "le": "at most", "multiple_of": "a multiple of"}
        name, limit = next(iter(context.items()))
        expected = f"{word[name]} {limit:g}"
    else:
        expected = _EXPECTED.get(kind.split("_", maxsplit=1)[0], str(error["msg"]))
    return f"{key} = {error['input']!r}: expected {expected}"
