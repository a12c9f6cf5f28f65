"""Ctrl-C, and a scheduler's SIGTERM, as a request between two steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_ECHO = 2.0  # seconds in which the same request may arrive again, from the terminal and from a launcher


class Interrupted(Exception):
    """The user, or the system, stopped the training. The message says what is saved."""


@contextmanager
def interruptions(message: Callable[[], str]) -> Iterator[None]:
    """Raise Interrupted with `message` for a KeyboardInterrupt, and for the error that a library made of one: the
    command line's handler of SIGINT is another one from its first call on.
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
    """Turn the first SIGINT or SIGTERM into a request, so that no step is cut in half; a later SIGINT stops at once, as
    it would have without this (a KeyboardInterrupt).

    Outside of the main thread signals cannot be caught, and nothing changes.
    """
    stop = StopRequest()
    previous: dict[int, Any] = {}
    process, first, launched = os.getpid(), 0.0, "WORLD_SIZE" in os.environ

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first, launched
        if os.getpid() != process:  # a worker that was just forked: this process decides
            return
        if stop.requested:
            # Schedulers signal a launcher and its processes, and the launcher passes it on: that is one request.
            if number == signal.SIGINT and not (launched and time.monotonic() - first < _ECHO):
                signal.signal(number, previous[number])
                if callable(previous[number]):
                    previous[number](number, frame)
                raise KeyboardInterrupt
            return
        stop.requested, first = True, time.monotonic()
        launched = launched or number != signal.SIGINT
        with suppress(RuntimeError):  # the signal may come while the same stream is written to
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
            if signal.getsignal(number) is ask:  # not after a second SIGINT, which set its own
                signal.signal(number, handler)
