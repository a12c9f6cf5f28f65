"""What the commands with `key=value` settings share: train, cache, generate and eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from ..settings.fields import Config

AnyConfig = TypeVar("AnyConfig", bound="Config")

IGNORE_UNKNOWN_OPTIONS = {"ignore_unknown_options": True}  # config_of_arguments corrects them to key=value

TrainSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [key=value ...]", help="A config (`ipadapter new` lists them) and changes to it."),
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[FILE] [key=value ...]", help="Settings, or a .toml file with them.")
]
ListOptions = Annotated[bool, typer.Option("--options", help="List every key with its default, values and meaning.")]


def read_settings(
    context: typer.Context, model: type[AnyConfig], arguments: list[str] | None, list_options: bool
) -> AnyConfig:
    """The settings of a command line; with --options, print the keys and exit. Raises ConfigError."""
    from ..settings.config_file import config_of_arguments, options_text

    if list_options:
        typer.echo(options_text(model))
        raise typer.Exit
    options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    return config_of_arguments(model, str(context.info_name), arguments or [], options)
