"""The log files in the output folder of a run.

output/config.toml              the settings; `ipadapter train config.toml` repeats the run
output/log.jsonl                lines of training steps ("loss") and of validations ("validation/loss")
output/samples/step-000200.png  the grid of samples of a validation
"""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..runtime.disk import whole_file

LOG_FILE, CONFIG_FILE, REPORT_FILE, SAMPLES = "log.jsonl", "config.toml", "report.html", "samples"

log = logging.getLogger(__name__)


def read_run(output: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """`read_log` of a folder given by the user, with a warning about unreadable lines.

    Raises DataError if it is no run, with an explanation and similar folder names.
    """
    file = output / LOG_FILE
    if not file.is_file():
        inside = next((parent for parent in output.parents if (parent / LOG_FILE).is_file()), None)
        if inside is not None and output.exists():
            raise DataError(
                f"{output} is a part of the run {inside}. Write `ipadapter report {shlex.quote(str(inside))}`."
            )
        found = "no such folder" if not output.exists() else f"no {LOG_FILE} in it" if output.is_dir() else "a file"
        raise DataError(f"{output}: {found}. {_what_a_run_is(output)}")
    train, validations = read_log(output)
    lines = _lines(file)
    broken = sum(_parse(line) is None for line in lines)
    if not train:
        what = f"none of its {len(lines)} lines is about training steps" if lines else "empty"
        raise DataError(f"{file}: {what}. The first line comes after log_every steps; try again then.")
    if broken:
        log.warning("%s: %d of %d lines cannot be read and are left out.", file, broken, len(lines))
    return train, validations


def _what_a_run_is(near: Path) -> str:
    text = f"A run is the output folder of a training, with {LOG_FILE}, {CONFIG_FILE} and checkpoints in it"
    folders = {file.parent for place in (near, near.parent, Path("runs")) for file in place.glob(f"*/{LOG_FILE}")}
    nearest = sorted(folders, key=lambda run: -difflib.SequenceMatcher(None, run.name, near.name).ratio())[:3]
    return f"{text}, such as {', '.join(map(str, nearest))}." if nearest else f"{text}."


def read_log(output: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The lines of training steps and those of validations; incomplete lines are left out."""
    parsed = [found for line in _lines(output / LOG_FILE) if (found := _parse(line)) is not None]
    return [line for line in parsed if "loss" in line], [line for line in parsed if "validation/loss" in line]


def sample_files(output: Path) -> dict[int, Path]:
    """The grids of samples of a run, by step in rising order."""
    steps = {file.stem.removeprefix("step-"): file for file in (output / SAMPLES).glob("step-*.png")}
    return dict(sorted((int(step), file) for step, file in steps.items() if step.isdecimal()))


def image_file(output: Path, name: str, step: int) -> Path:
    """The file of an image of a run."""
    return output / name / f"step-{step:06d}.png"


def drop_past(output: Path, start: int) -> None:
    """Delete the lines and samples after the step `start`; with 0 all of them."""
    kept_until = start or -1
    file = output / LOG_FILE
    kept = [line for line in _lines(file) if (found := _parse(line)) is not None and found["step"] <= kept_until]
    replace_text(file, "".join(line + "\n" for line in kept))
    for step, sample in sample_files(output).items():
        if step > kept_until:
            sample.unlink()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def _parse(line: str) -> dict[str, float] | None:
    """A line of the log; None if it is incomplete or has other content."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or "step" not in found:
        return None
    return found if all(isinstance(value, int | float) for value in found.values()) else None


def replace_text(file: Path, text: str) -> None:
    """Replace a file atomically. Raises DiskError."""
    data = text.encode("utf-8")
    with whole_file(file, need=len(data)) as temporary:
        temporary.write_bytes(data)


def append_line(file: Path, line: str) -> None:
    """Append a line completely or not at all: half a line would damage the next."""
    with file.open("ab", buffering=0) as stream:
        before, data = stream.tell(), f"{line}\n".encode()
        try:
            if stream.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(before)
            raise


def to_toml(config: Mapping[str, Any]) -> str:
    """Settings as TOML. None, which TOML lacks, is left out; it is always the default."""
    return "".join(
        # Strings, numbers and booleans are written alike in JSON and TOML, but for DEL, which TOML wants escaped.
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", r"\u007f")
        for name, value in config.items()
        if value is not None
    )
