"""What a run leaves in its output folder besides checkpoints, for its own log, the report and any plotting tool.

output/config.toml              the settings; `ipadapter train config.toml` repeats the run
output/log.jsonl                lines about the training and about validations, told apart by their keys
output/samples/step-000200.png  the grid of samples of a validation
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_FILE, CONFIG_FILE, SAMPLES = "log.jsonl", "config.toml", "samples"


def read_log(output: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The lines of a run about its training and about its validations; a line cut short by a kill is left out."""
    file = output / LOG_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    parsed = [json.loads(line) for line in lines if _step_of(line) < math.inf]
    return [line for line in parsed if "loss" in line], [line for line in parsed if "validation/loss" in line]


def sample_files(output: Path) -> dict[int, Path]:
    """The grids of samples of a run, by step in rising order."""
    found = {int(file.stem.removeprefix("step-")): file for file in (output / SAMPLES).glob("step-[0-9]*.png")}
    return dict(sorted(found.items()))


def picture_file(output: Path, name: str, step: int) -> Path:
    """Where a run keeps a picture."""
    return output / name / f"step-{step:06d}.png"


def drop_past(output: Path, start: int) -> None:
    """Drop the lines and samples past the step `start`. A training that starts at step 0 starts anew: nothing stays."""
    kept_until = start or -1
    file = output / LOG_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    replace_text(file, "".join(line + "\n" for line in lines if _step_of(line) <= kept_until))
    for step, sample in sample_files(output).items():
        if step > kept_until:
            sample.unlink()


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return math.inf


def replace_text(file: Path, text: str) -> None:
    """Write a file by one rename, so that a kill leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def to_toml(config: Mapping[str, Any]) -> str:
    """Settings as TOML; None, which it has no word for, is left out: it is the default where it is allowed."""
    return "".join(
        # A JSON string, number or truth value is a TOML one.
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in config.items()
        if value is not None
    )
