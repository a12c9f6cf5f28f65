"""Ctrl-C, and errors that the user can fix: one line on stderr and an exit status."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

USER_ERROR, INTERRUPTED = 2, 130
_CLEANING = 1.0  # seconds for an interrupted command to remove its temporary files
TRAINING_MEMORY = (
    "Lower batch_size (gradient_accumulation_steps makes up for it), set gradient_checkpointing=true or "
    "mixed_precision=bf16, or train from a cache (`ipadapter cache`)."
)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_WORKER_ENDED = re.compile(r"DataLoader worker .*?((killed by signal: [\w ]+)|exited unexpectedly)")


def catch_interrupts() -> None:
    """Install handlers for Ctrl-C and SIGTERM; neither prints a traceback.

    The first one stops the command, which removes its temporary files. A later Ctrl-C ends the process, at the earliest
    after `_CLEANING`; a second SIGTERM kills it. Background commands, which ignore Ctrl-C, continue to ignore it.
    """
    process, first = os.getpid(), 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != process:  # a worker that was just forked: only the main process reacts
            return
        first = time.monotonic()
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process and time.monotonic() - first > _CLEANING:
            os._exit(INTERRUPTED)

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    def unraisable(problem: Any) -> None:
        if issubclass(problem.exc_type, KeyboardInterrupt):  # raised where Python can only print it
            os._exit(INTERRUPTED)
        sys.__unraisablehook__(problem)

    sys.unraisablehook = unraisable
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


# Newer versions of typer vendor click, so the class cannot be imported from click.
_ClickException = cast(type[typer.BadParameter], typer.BadParameter.__mro__[2])


class Commands(TyperGroup):
    """The commands. Mistakes in the command line are reported in one line, like all other errors."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an option given twice, whose first value would be dropped."""
        name, command, rest = super().resolve_command(ctx, args)
        for parameter in command.params if command is not None else ():
            if getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", True):
                continue
            given = [word for word in rest if word.partition("=")[0] in parameter.opts]
            if len(given) > 1:
                raise typer.BadParameter(f"{parameter.opts[0]} is given {len(given)} times. Give it once.")
        return name, command, rest

    def main(self, *args: Any, **options: Any) -> None:
        """Run a command and exit with its exit status."""
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


def finite(value: float) -> float:
    """Option callback that refuses nan and inf."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


@contextmanager
def user_errors(*, stopped: str = "Stopped.", memory: str = TRAINING_MEMORY) -> Iterator[None]:
    """Report errors that the user can fix in one line on stderr, with exit status 2.

    `stopped` is printed after Ctrl-C, `memory` is the advice when memory runs out.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_useful)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except KeyboardInterrupt:
        _stop(stopped)
    except typer.Exit:
        raise
    except Exception as error:
        if signal.getsignal(signal.SIGINT) is not interrupt:  # a library replaced KeyboardInterrupt by its own error
            _stop(stopped)
        message = _message(error, memory)
        if message is None:
            raise
        typer.echo(f"ipadapter: {' '.join(message.split())}", err=True)
        raise typer.Exit(USER_ERROR) from None


def _is_useful(record: logging.LogRecord) -> bool:
    """Drop the warnings of transformers when diffusers imports image processors and torchvision is missing."""
    return "requires torchvision" not in record.getMessage()


def quiet() -> None:
    """Turn off the progress bars of loading models: there are many, and each is short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _message(error: Exception, memory: str) -> str | None:
    """The message for the user; None for a bug, which keeps its traceback."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed. Install the trainer with: pip install 'ip-adapter-kit[train]'"
    from ..errors import TrainerError

    if isinstance(error, TrainerError):
        return str(error)
    from safetensors import SafetensorError

    from ipadapter_core import AdapterError  # imports torch: only if it may be one

    if isinstance(error, (AdapterError, SafetensorError)):
        return str(error)
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:  # `ipadapter ... | head`
            return None
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return _memory_problem(error, memory)


def _memory_problem(error: Exception, memory: str) -> str | None:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        return f"Out of memory{f' ({wanted[1]} more are needed)' if wanted else ''}. {memory}"
    if isinstance(error, RuntimeError) and (ended := _WORKER_ENDED.search(str(error))):
        return (
            f"A data loader worker died ({ended[1]}), most likely because memory or /dev/shm is full. "
            "Lower num_workers (0 loads images in the main process) or batch_size."
        )
    return None


def _stop(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(INTERRUPTED) from None
