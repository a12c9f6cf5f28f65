"""Ctrl-C, and a scheduler's SIGTERM, as a request between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ECHO = 2.0  # seconds in which the same request may arrive again, from the terminal and from a launcher


class StopRequest:
    """Whether the training should stop after the current step."""

    requested = False


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, so that no step is cut in half; a later SIGINT stops at once.

    Outside of the main thread signals cannot be caught, and nothing changes.
    """
    stop = StopRequest()
    previous: dict[int, Any] = {}
    first = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.requested:
            # Schedulers signal a launcher and its processes, and the launcher passes it on: that is one request.
            if number == signal.SIGINT and time.monotonic() - first > _ECHO:
                raise KeyboardInterrupt
            return
        stop.requested, first = True, time.monotonic()
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
            signal.signal(number, handler)
