"""The words after `ipadapter train` and `ipadapter cache`: a config and `key=value` settings, or how to write them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence

from ..errors import ConfigError
from .config import TrainConfig
from .shipped import config_names

_FIELDS = TrainConfig.model_fields


def split_arguments(
    command: str, arguments: Sequence[str], options: Sequence[str] = ()
) -> tuple[str | None, list[str]]:
    """The config's name, if there is one, and the settings; `options` are those that the command has.

    Raises ConfigError without arguments, and for whatever is written in another way, all at once: `--steps 5`,
    `steps = 5`, `batch-size=4`, a value without its key, a second config.
    """
    if not arguments:
        folder = "cache=caches/mine" if command == "cache" else "output=runs/mine"
        raise ConfigError(
            f"Write `ipadapter {command} CONFIG key=value ...`, such as `ipadapter {command} sd15-base data=images "
            f"{folder}`. `ipadapter new` lists the configs, `ipadapter train --options` the keys."
        )
    configs: list[str] = []
    settings: list[str] = []
    problems: list[str] = []
    for number, (words, key, value) in enumerate(_grouped(arguments)):
        written = " ".join(words)
        if len(words) > 1 or written.startswith("-") or (value is not None and _field(key) not in (key.strip(), None)):
            problems.append(_correction(written, key, value, options))
        elif value is not None:
            settings.append(written)
        elif number == 0 or is_config(written):
            configs.append(written)
        else:
            example = "steps" if written.replace("_", "").isdecimal() else "data"
            problems.append(f"{written!r} has no key. Write key=value, such as {example}={written}.")
    if len(configs) > 1:
        problems.append(f"Give at most one config, not {' and '.join(configs)}.")
    if problems:
        raise ConfigError(" ".join(problems))
    return (configs[0] if configs else None), settings


def is_config(word: str) -> bool:
    """Whether a word is meant as a config: the name of a shipped one, or a TOML file."""
    return word.endswith(".toml") or word in config_names()


def nearest(key: str) -> str | None:
    """The setting that an unknown key is most like."""
    return next(iter(difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.5)), None)


def _grouped(arguments: Sequence[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """The words that belong together, with their key and value: `steps=5`, `steps = 5`, `--steps 5`, `--steps=5`."""
    rest = list(arguments)

    def is_value(word: str) -> bool:
        return "=" not in word and not word.startswith("-") and not is_config(word)

    while rest:
        words = [rest.pop(0)]
        key, equals, value = words[0].partition("=")
        if not equals and rest and rest[0].startswith("="):
            words.append(rest.pop(0))
            equals, value = "=", words[-1][1:]
        takes_value = not value and (equals or key.startswith("-") or _field(key) is not None)
        if takes_value and rest and is_value(rest[0]):
            words.append(rest.pop(0))
            equals, value = "=", words[-1]
        yield words, key.lstrip("-"), value if equals else None


def _field(key: str) -> str | None:
    name = key.strip().replace("-", "_").lower()
    return name if name in _FIELDS else None


def _correction(written: str, key: str, value: str | None, options: Sequence[str]) -> str:
    field = _field(key)
    given = shlex.quote(value) if value else "true" if field and _FIELDS[field].annotation is bool else "..."
    if field is not None:
        return f"Write {field}={given} instead of {written}."
    option = difflib.get_close_matches(f"--{key}", options, n=1)
    near = nearest(key)
    if option:
        hint = f"Did you mean {option[0]}?"
    else:
        hint = f"Did you mean {near}={given}?" if near else "Settings are written key=value."
    return f"{written}: no such option or key. {hint}"
