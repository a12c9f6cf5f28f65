"""The losses of a training, in a file that any plotting tool reads."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from .engine import Progress, check_loss

LOG_FILE = "log.jsonl"


class LossLog:
    """log.jsonl: one line per `write`, with the mean loss since the one before. Lines past `start` are from a
    run that was killed after its last checkpoint, and are dropped.
    """

    def __init__(self, file: Path, start: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        kept = [line for line in lines if _step_of(line) <= start]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file, self._losses, self._images = file, list[Tensor](), 0
        self._since, self._step = time.monotonic(), start

    def add(self, progress: Progress) -> None:
        """Remember a step without waiting for the device."""
        self._losses.append(progress.loss)
        self._images += progress.images
        self._step = progress.step

    def write(self) -> dict[str, float]:
        """Write and return the line. Raises DivergedError when the loss is not a number."""
        loss = check_loss(self._step, float(torch.stack(self._losses).mean()))
        now = time.monotonic()
        speed = self._images / max(now - self._since, 1e-9)
        line = {"step": self._step, "loss": loss, "images_per_second": round(speed, 3)}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._losses, self._images, self._since = [], 0, now
        return line


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return math.inf
