"""`ipadapter models` and `ipadapter new`: models and configs to start a training with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import user_errors

if TYPE_CHECKING:
    from ..models.published_models import PublishedModel


def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Models from the list, or configs; default: all.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download missing files.")] = False,
) -> None:
    """List the models that the configs need, which are present, and how to download them.

    ipadapter models sd15-plus --download
    """
    with user_errors():
        from ..errors import ConfigError
        from ..models.published_models import PUBLISHED_MODELS, models_of

        if not names and not download:
            typer.echo("\n".join(_row(model) for model in PUBLISHED_MODELS))
            typer.echo("\n`ipadapter models NAME --download` downloads one, or all that the config NAME needs.")
            return
        if not names:
            raise ConfigError("Name what to download, models or configs: `ipadapter models sd15-base --download`.")
        chosen = models_of(names)
        from ..models.hub import download as download_model  # imports torch, which the list does not need
        from ..models.hub import hub_command

        if not download:
            typer.echo("\n".join(f"{_row(model)}\n    {hub_command(model)}" for model in chosen))
            return
        for model in chosen:
            if model.missing():
                typer.echo(f"{model.place}: downloading {model.repository} ({model.size})")
                download_model(model)
            typer.echo(f"{model.place}: found")


def new(
    name: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="The config to copy.")] = None,
    out: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: CONFIG.toml in this folder.")] = None,
) -> None:
    """Copy a config, with its comments, for editing; or list the configs.

    ipadapter new sd15-plus mine.toml
    """
    with user_errors():
        from ..settings.shipped import config_names, config_summary, write_config

        if name is None:
            typer.echo("\n".join(f"{name:22} {config_summary(name)}" for name in config_names()))
            return
        path = write_config(name, out or Path(f"{Path(name).stem}.toml"))
        typer.echo(f"Saved {path}. Train with: ipadapter train {path} data=images output=runs/mine")


def _row(model: PublishedModel) -> str:
    missing = model.missing()
    state = "found" if not missing else "missing" if len(missing) == len(model.files) else "incomplete"
    row = f"{model.name:31} {state:10} {model.size:>7}  {model.place}  ({model.use})"
    return row if state != "incomplete" else f"{row}\n    without {', '.join(missing)}"
