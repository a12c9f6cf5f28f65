"""What the command line does when something goes wrong that the user can put right."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

USER_ERROR, INTERRUPTED = 2, 130


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)
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


def _is_of_use(record: logging.LogRecord) -> bool:
    """diffusers imports image processors by names that transformers warns about where torchvision is missing."""
    return "requires torchvision" not in record.getMessage()


def quiet() -> None:
    """No progress bars for the loading of parts: there are many, and each is short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _fail(message: str) -> None:
    typer.echo(f"ipadapter: {' '.join(message.split())}", err=True)
    raise typer.Exit(USER_ERROR) from None
