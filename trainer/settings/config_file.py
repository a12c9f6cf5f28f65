"""A TOML file and `key=value` overrides -> TrainConfig, and refusals before anything is loaded."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from .config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def config_of_arguments(command: str, arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line, `[CONFIG.toml] [key=value ...]`.

    Raises ConfigError for more than one file, or one that is not the first argument, and as `load_config` does.
    """
    files = [argument for argument in arguments if "=" not in argument]
    if not arguments or len(files) > 1 or (files and arguments[0] != files[0]):
        raise ConfigError(
            f"Write `ipadapter {command} [CONFIG.toml] [key=value ...]`: at most one file, and it comes first. "
            "`ipadapter train --options` lists the keys."
        )
    return load_config(Path(files[0]) if files else None, [argument for argument in arguments if "=" in argument])


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
