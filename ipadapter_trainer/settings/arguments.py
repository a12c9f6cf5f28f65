"""Command lines of the form `[CONFIG] [key=value ...]`, and corrections for other ways of writing them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence

from ..errors import ConfigError
from .fields import Config
from .shipped import config_names

_EXAMPLES = {
    "train": "sd15-base data=images output=runs/mine",
    "cache": "sd15-base data=images cache=caches/mine",
    "generate": "base_model=models/stable-diffusion-v1-5 adapter=runs/mine image=cat.png output=image.png",
    "eval": "base_model=models/stable-diffusion-v1-5 adapter=runs/mine data=images clip=models/clip-vit-large-patch14",
}


def split_arguments(
    model: type[Config], command: str, arguments: Sequence[str], options: Sequence[str] = ()
) -> tuple[str | None, list[str]]:
    """The config, if there is one, and the key=value settings. `options` are the --options of the command.

    Raises ConfigError without arguments, and for all arguments that are written in another way: `--steps 5`,
    `steps = 5`, `batch-size=4`, a value without a key, a second config.
    """
    has_presets = model.command == "train"
    if not arguments:
        config, names = ("CONFIG ", "`ipadapter new` lists the configs, ") if has_presets else ("", "")
        keys = f"`ipadapter {model.command} --options` {'' if has_presets else 'lists '}the keys."
        raise ConfigError(
            f"Write `ipadapter {command} {config}key=value ...`, such as `ipadapter {command} {_EXAMPLES[command]}`. "
            f"{names}{keys}"
        )
    configs: list[str] = []
    settings: list[str] = []
    problems: list[str] = []
    for number, (words, key, value) in enumerate(_grouped(model, arguments)):
        written = " ".join(words)
        misspelt = value is not None and _field(model, key) not in (key.strip(), None)
        if len(words) > 1 or written.startswith("-") or misspelt:
            problems.append(_correction(model, written, key, value, options))
        elif value is not None:
            settings.append(written)
        elif is_config(model, written) or (number == 0 and has_presets):
            configs.append(written)
        else:
            problems.append(_without_key(model, written))
    if len(configs) > 1:
        problems.append(f"Give at most one config, not {' and '.join(configs)}.")
    if problems:
        raise ConfigError(" ".join(problems))
    return (configs[0] if configs else None), settings


def is_config(model: type[Config], word: str) -> bool:
    """Whether a word is a TOML file, or the name of a config that comes with this package."""
    return word.endswith(".toml") or (model.command == "train" and word in config_names())


def nearest(model: type[Config], key: str) -> str | None:
    """The key most like an unknown one, or with a word like it: steps -> num_inference_steps."""
    if keys := difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5):
        return keys[0]
    by_word = {word: name for name in model.model_fields for word in name.split("_")}
    words = difflib.get_close_matches(key, by_word, n=1, cutoff=0.75)
    return by_word[words[0]] if words else None


def _grouped(model: type[Config], arguments: Sequence[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Words that belong together, with their key and value: `steps=5`, `steps = 5`, `--steps 5`, `--steps=5`."""
    rest = list(arguments)

    def is_value(word: str) -> bool:
        return "=" not in word and not word.startswith("-") and not is_config(model, word)

    while rest:
        words = [rest.pop(0)]
        key, equals, value = words[0].partition("=")
        if not equals and rest and rest[0].startswith("="):
            words.append(rest.pop(0))
            equals, value = "=", words[-1][1:]
        takes_value = not value and (equals or key.startswith("-") or _field(model, key) is not None)
        if takes_value and rest and is_value(rest[0]):
            words.append(rest.pop(0))
            equals, value = "=", words[-1]
        yield words, key.lstrip("-"), value if equals else None


def _field(model: type[Config], key: str) -> str | None:
    name = key.strip().replace("-", "_").lower()
    return name if name in model.model_fields else None


def _correction(model: type[Config], written: str, key: str, value: str | None, options: Sequence[str]) -> str:
    field = _field(model, key)
    is_switch = field is not None and model.model_fields[field].annotation in (bool, bool | None)
    given = shlex.quote(value) if value else "true" if is_switch else "..."
    if field is not None:
        return f"Write {field}={given} instead of {written}."
    option = difflib.get_close_matches(f"--{key}", options, n=1)
    near = nearest(model, key.replace("-", "_"))
    if option:
        hint = f"Did you mean {option[0]}?"
    else:
        hint = f"Did you mean {near}={given}?" if near else "Settings are written key=value."
    return f"{written}: no such option or key. {hint}"


def _without_key(model: type[Config], value: str) -> str:
    keys = ("steps", "num_images", "limit") if value.replace("_", "").isdecimal() else ("data", "image")
    example = next(key for key in keys if key in model.model_fields)
    return f"{value!r} has no key. Write key=value, such as {example}={value}."
