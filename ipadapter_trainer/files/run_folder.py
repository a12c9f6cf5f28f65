"""TODO."""

from __future__ import annotations

import re
from pathlib import Path

ADAPTER_FILE = "adapter.safetensors"


STATE_FILE = "training.pt"


_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints of an output folder, oldest first."""
    if not output.is_dir():
        return []
    found = [p for p in output.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted((p for p in found if (p / ADAPTER_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])
