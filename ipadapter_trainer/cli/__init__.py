"""The command `ipadapter`. Heavy imports are deferred until a command runs, so that --help is instant."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import sys
from typing import Annotated

import typer

from . import data, files, images, models, report, train
from .errors import Commands, catch_interrupts
from .settings import IGNORE_UNKNOWN_OPTIONS

app = typer.Typer(
    name="ipadapter",
    cls=Commands,
    help="Train, evaluate, inspect and convert IP-Adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry point."""
    catch_interrupts()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that the terminal cannot show must not end a training
        with contextlib.suppress(OSError):  # of a stream that another one took the place of
            sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)  # else Python looks for garbage among all that PyTorch consists of: for over a second
    app()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"ip-adapter-kit {version('ip-adapter-kit')}")
    except PackageNotFoundError:  # run from a checkout
        typer.echo("ip-adapter-kit (not installed)")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        # Eager: handled before the missing command is reported.
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


data_app = typer.Typer(help="Check a data set.", no_args_is_help=True)
data_app.command("check")(data.check)

app.command("train", context_settings=IGNORE_UNKNOWN_OPTIONS)(train.train)
app.command("cache", context_settings=IGNORE_UNKNOWN_OPTIONS)(train.cache)
app.command("generate", context_settings=IGNORE_UNKNOWN_OPTIONS)(images.generate)
app.command("eval", context_settings=IGNORE_UNKNOWN_OPTIONS)(images.evaluate)
app.command("demo")(images.demo)
app.command("export")(files.export)
app.command("convert")(files.convert)
app.command("inspect")(files.inspect)
app.command("diff")(files.diff)
app.add_typer(data_app, name="data")
app.command("report")(report.report)
app.command("models")(models.models)
app.command("new")(models.new)

if __name__ == "__main__":
    main()
