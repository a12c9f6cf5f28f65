"""A TOML file and `key=value` overrides -> TrainConfig, and refusals before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .arguments import nearest, split_arguments
from .config import TrainConfig
from .shipped import find_config, read_config


def load_config(file: Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and `key=value` overrides (an empty value or "none" unsets an optional key).

    Raises ConfigError for a missing or malformed file, and as `make_config` does.
    """
    values: dict[str, Any] = {} if file is None else read_config(file)
    given: dict[str, str] = {}
    twice: list[str] = []
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override. Write key=value, such as steps=1000.")
        if key in given:
            twice.append(f"{key} is given twice, {given[key]!r} and {value!r}")
        given[key] = value
    if twice:
        raise ConfigError(f"{'; '.join(twice)}. Leave one out.")
    return make_config({**values, **given})


def config_of_arguments(command: str, arguments: Sequence[str], options: Sequence[str] = ()) -> TrainConfig:
    """The settings of a command line, `[CONFIG] [key=value ...]`; `options` are what else the command takes.

    Raises ConfigError as `split_arguments`, `find_config` and `load_config` do.
    """
    config, settings = split_arguments(command, arguments, options)
    return load_config(None if config is None else find_config(config), settings)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Validate settings by name.

    Raises ConfigError that names an unknown key with the nearest valid one, a missing key, a value of the
    wrong type with the expected type, or settings that exclude each other; all problems at once.
    """
    fields = TrainConfig.model_fields
    optional = {name for name, field in fields.items() if field.default is None}
    required = {name for name, field in fields.items() if field.is_required()}
    cleaned = {
        k: None if k in optional and v in ("", "none") else v
        for k, v in values.items()
        if k not in required or v != ""  # a shell variable that is not set is no path
    }
    try:
        return TrainConfig.model_validate(cleaned)
    except ValidationError as error:
        problems = [_problem(dict(e)) for e in error.errors()]
    text = "; ".join(problems)
    raise ConfigError(text if text.endswith("?") else text + ".")


def options_text() -> str:
    """Every key with its default, the values that it takes and its meaning, for `ipadapter train --options`."""
    lines: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        default = "required" if field.is_required() else _shown(field.default)
        lines.append(f"{name} ({default}): {_allowed(field)}\n    {field.description}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is None:
        return "unset"
    return str(default).lower() if isinstance(default, bool) else str(default) or "empty"


def _allowed(field: FieldInfo) -> str:
    """The values that a setting takes, in words."""
    kind: Any = field.annotation
    if get_origin(kind) is not Literal and get_args(kind):  # X | None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"{', '.join(others)} or {last}"
    limits = [
        f"{word} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, word in _LIMITS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_EXPECTED[kind.__name__.lower()], *limits])


_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "path": "a path",
    "string": "text",
    "str": "text",
}


def _problem(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a clause without a full stop."""
    kind, key = str(error["type"]), ".".join(str(part) for part in error["loc"])
    if kind == "extra_forbidden":
        near = nearest(key)
        hint = f"did you mean {near!r}?" if near else "see `ipadapter train --options`"
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"{key} is missing; write {key}=... ({TrainConfig.model_fields[key].description})"
    if kind == "value_error":  # a refused combination
        return str(error["ctx"]["error"])
    context = error.get("ctx", {})
    if kind == "literal_error":
        expected = context["expected"]
    elif (name := next(iter(context), None)) in _LIMITS:
        expected = f"{_LIMITS[name]} {context[name]:g}"
    else:
        expected = _EXPECTED.get(kind.split("_", maxsplit=1)[0], str(error["msg"]))
    return f"{key} = {error['input']!r}: expected {expected}"
