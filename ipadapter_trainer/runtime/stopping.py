"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_ECHO = 2.0  # seconds in which a launcher may repeat the signal of the terminal or scheduler


class Interrupted(Exception):
    """The user or the system stopped the training. The message names what is saved."""


@contextmanager
def interruptions(message: Callable[[], str]) -> Iterator[None]:
    """Raise Interrupted with `message` for a KeyboardInterrupt, or for the error that a library raised because of one.
    The latter is recognised by the SIGINT handler, which the command line replaces at the first signal.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message()) from None
    except Interrupted:
        raise
    except Exception:
        if signal.getsignal(signal.SIGINT) is handler:
            raise
        raise Interrupted(message()) from None


class StopRequest:
    """Whether the training should stop after the current step."""

    requested = False


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, so that the step is finished; the next SIGINT stops at once with
    a KeyboardInterrupt.

    Has no effect outside of the main thread, where signals cannot be handled.
    """
    stop = StopRequest()
    previous: dict[int, Any] = {}
    process, first, launched = os.getpid(), 0.0, "WORLD_SIZE" in os.environ

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first, launched
        if os.getpid() != process:  # a worker that was just forked
            return
        if stop.requested:
            # A scheduler signals the launcher and its processes, and the launcher repeats the signal: one request.
            if number == signal.SIGINT and not (launched and time.monotonic() - first < _ECHO):
                signal.signal(number, previous[number])
                if callable(previous[number]):
                    previous[number](number, frame)
                raise KeyboardInterrupt
            return
        stop.requested, first = True, time.monotonic()
        launched = launched or number != signal.SIGINT
        with suppress(RuntimeError):  # the signal may arrive during a write to the same stream
            say("Stopping after this step; Ctrl-C again stops at once, without saving.")

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread
            break
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is ask:  # a second SIGINT replaces it
                signal.signal(number, handler)
