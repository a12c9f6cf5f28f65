"""Signals as requests between two steps."""

from __future__ import annotations

import signal
import time

import pytest

from ipadapter_trainer.runtime import stopping
from ipadapter_trainer.runtime.stopping import stop_requests


def test_the_echo_of_a_request_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal or a scheduler signals the launcher's processes too, and the launcher passes its own signal on."""
    said: list[str] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests(said.append) as stop:
        assert not stop.requested
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.requested
        assert len(said) == 1
        monkeypatch.setattr(stopping, "_ECHO", 0.0)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
