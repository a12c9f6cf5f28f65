"""A TOML file and `key=value` overrides -> validated settings, and the list of all keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .arguments import nearest, split_arguments
from .config import TrainConfig
from .fields import Config
from .shipped import find_config, read_config

AnyConfig = TypeVar("AnyConfig", bound=Config)

_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "path": "a path",
    "string": "text",
    "str": "text",
    "tuple": "numbers with commas",
}


def load_config(model: type[AnyConfig], file: Path | None = None, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a TOML file and `key=value` overrides (an empty value or "none" unsets an optional key).

    Raises ConfigError for a missing or malformed file, for overrides without a key or given twice, and as `validate`.
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
    return validate(model, {**values, **given})


def config_of_arguments(
    model: type[AnyConfig], command: str, arguments: Sequence[str], options: Sequence[str] = ()
) -> AnyConfig:
    """The settings of a command line `[CONFIG] [key=value ...]`. `options` are the --options of the command.

    Raises ConfigError as `split_arguments`, `find_config` and `load_config` do.
    """
    config, settings = split_arguments(model, command, arguments, options)
    return load_config(model, None if config is None else find_config(config), settings)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """The settings of a training from Python values. Raises ConfigError as `validate`."""
    return validate(TrainConfig, values)


def validate(model: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    """Validate settings by name.

    Raises ConfigError with all problems: unknown keys with the nearest valid one, missing keys, values of the wrong
    type with the expected type, and settings that exclude each other.
    """
    fields = model.model_fields
    optional = {name for name, field in fields.items() if not field.is_required() and field.default is None}
    required = {name for name, field in fields.items() if field.is_required()}
    cleaned = {
        key: None if key in optional and value in ("", "none") else value
        for key, value in values.items()
        if key not in required or value != ""  # an unset shell variable
    }
    try:
        return model.model_validate(cleaned)
    except ValidationError as error:
        text = "; ".join(_problem(model, dict(problem)) for problem in error.errors())
    raise ConfigError(text if text.endswith("?") else text + ".")


def options_text(model: type[Config]) -> str:
    """Every key with its default, the values that it takes and its meaning, for --options."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default_text(field.default)
        lines.append(f"{name} ({default}): {_allowed(field)}\n    {field.description}")
    return "\n".join(lines)


def _default_text(default: Any) -> str:
    if default is None:
        return "unset"
    if isinstance(default, tuple):
        return ",".join(f"{value:g}" for value in default)
    return str(default).lower() if isinstance(default, bool) else str(default) or "empty"


def _allowed(field: FieldInfo) -> str:
    """The values that a setting takes, in words."""
    kind: Any = field.annotation
    if get_origin(kind) not in (Literal, tuple) and get_args(kind):  # X | None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"{', '.join(others)} or {last}"
    limits = [
        f"{word} {getattr(rule, name):.10g}"
        for rule in field.metadata
        for name, word in _LIMITS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_EXPECTED[(get_origin(kind) or kind).__name__.lower()], *limits])


def _problem(model: type[Config], error: dict[str, Any]) -> str:
    """One of pydantic's errors as a clause without a full stop."""
    kind, key = str(error["type"]), str(next(iter(error["loc"]), ""))
    if kind == "extra_forbidden":
        near = nearest(model, key)
        hint = f"did you mean {near!r}?" if near else f"see `ipadapter {model.command} --options`"
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"{key} is missing; write {key}=... ({model.model_fields[key].description})"
    context = error.get("ctx", {})
    if kind == "value_error":  # of a validator of ours
        return str(context["error"])
    if kind == "literal_error":
        expected = context["expected"]
    elif (name := next(iter(context), None)) in _LIMITS:
        expected = f"{_LIMITS[name]} {context[name]:.10g}"
    else:
        expected = _EXPECTED.get(kind.split("_", maxsplit=1)[0], str(error["msg"]))
    return f"{key} = {error['input']!r}: expected {expected}"
