"""What the command line does when something goes wrong that the user can put right."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

USER_ERROR, INTERRUPTED = 2, 130
# Newer versions of typer bring a click of their own, with this class in it.
_ClickException = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """The commands; a mistake in the command line itself is answered with one line, as every other mistake is."""

    def main(self, *args: Any, **options: Any) -> None:
        """Run a command and exit with its status."""
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except _ClickException as error:
            context = error.ctx
            if "NoArgsIsHelp" in type(error).__name__:
                error.show()
                sys.exit(USER_ERROR)
            text = " ".join(error.format_message().split())
            text = text if text.endswith((".", "?", "!")) else f"{text}."
            more = "" if context is None else f" `{context.command_path} --help` shows more."
            typer.echo(f"ipadapter: {text}{more}", err=True)
            sys.exit(USER_ERROR)
        except typer.Abort:
            typer.echo("Stopped.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


def options_of(context: typer.Context) -> list[str]:
    """The options of a command, such as --dry-run."""
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def finite(value: float) -> float:
    """For a number of the command line: refuses nan and inf."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except ValueError as error:
        from ipadapter_core import AdapterError

        from ..errors import TrainerError

        if not isinstance(error, (AdapterError, TrainerError)):
            raise
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed. Install the trainer with: pip install 'ip-adapter-kit[train]'")


def quiet() -> None:
    """No progress bars for the loading of parts: there are many, and each is short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _fail(message: str) -> None:
    typer.echo(f"ipadapter: {' '.join(message.split())}", err=True)
    raise typer.Exit(USER_ERROR) from None
