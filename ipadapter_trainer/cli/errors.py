"""What the command line does when it is interrupted, and when something goes wrong that the user can put right."""

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
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

USER_ERROR, INTERRUPTED = 2, 130
_CLEANING = 1.0  # seconds that an interrupted command has to remove its temporary files
TRAINING_MEMORY = (
    "Lower batch_size (gradient_accumulation_steps makes up for it), set gradient_checkpointing=true or "
    "mixed_precision=bf16, or train from a cache (`ipadapter cache`)."
)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_WORKER_ENDED = re.compile(r"DataLoader worker .*?((killed by signal: [\w ]+)|exited unexpectedly)")


def catch_interrupts() -> None:
    """Let the first Ctrl-C stop the command, which then removes its temporary files, and a later one end the process.
    None prints a traceback. A command in the background, where Ctrl-C is ignored, keeps ignoring it. The first SIGTERM
    stops the command in the same way, the next one at once.
    """
    process, first = os.getpid(), 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if os.getpid() != process:  # a worker that was just forked: this process decides
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
        if issubclass(problem.exc_type, KeyboardInterrupt):  # it came where Python can only print it
            os._exit(INTERRUPTED)
        sys.__unraisablehook__(problem)

    sys.unraisablehook = unraisable
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


# Newer versions of typer bring a click of their own, with this class in it.
_ClickException = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """The commands; a mistake in the command line itself is answered with one line, as every other mistake is."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an option that is given twice, of which the first value would be dropped."""
        name, command, rest = super().resolve_command(ctx, args)
        for parameter in command.params if command is not None else ():
            if getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", True):
                continue
            given = [word for word in rest if word.partition("=")[0] in parameter.opts]
            if len(given) > 1:
                raise typer.BadParameter(f"{parameter.opts[0]} is given {len(given)} times. Leave all but one out.")
        return name, command, rest

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
def user_errors(*, stopped: str = "Stopped.", memory: str = TRAINING_MEMORY) -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit status 2. `stopped` is printed after Ctrl-C,
    `memory` is the advice when the memory is full.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except KeyboardInterrupt:
        _stop(stopped)
    except typer.Exit:
        raise
    except Exception as error:
        if signal.getsignal(signal.SIGINT) is not interrupt:  # a library made another error of the interruption
            _stop(stopped)
        message = _message(error, memory)
        if message is None:
            raise
        typer.echo(f"ipadapter: {' '.join(message.split())}", err=True)
        raise typer.Exit(USER_ERROR) from None


def _is_of_use(record: logging.LogRecord) -> bool:
    """diffusers imports image processors by names that transformers warns about where torchvision is missing."""
    return "requires torchvision" not in record.getMessage()


def quiet() -> None:
    """No progress bars for the loading of parts: there are many, and each is short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _message(error: Exception, memory: str) -> str | None:
    """What to tell the user; None for an error of ours."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed. Install the trainer with: pip install 'ip-adapter-kit[train]'"
    from safetensors import SafetensorError

    from ipadapter_core import AdapterError

    from ..errors import TrainerError

    if isinstance(error, (AdapterError, TrainerError, SafetensorError)):
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
            f"A process that decodes images ended ({ended[1]}), most likely because the memory or /dev/shm is full. "
            "Lower workers (0 decodes in the main process) or batch_size."
        )
    return None


def _stop(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(INTERRUPTED) from None
