"""Functions that run in a process of their own: measure the training of one contender, or write a cache."""

from __future__ import annotations

import importlib
import io
import json
import re
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from training_profile import Profile
from training_tries import PROFILE, TRIES, TRY

# What the package of tutorial_train.py imports, and where diffusers has it now: module, name, new module.
MOVED_NAMES = (
    ("diffusers.pipelines.controlnet", "MultiControlNetModel", "diffusers.models.controlnets.multicontrolnet"),
)
STEP_LINE = re.compile(r"Epoch \d+, step \d+, .*step_loss: (\S+)")


@dataclass(frozen=True)
class Measured:
    """The steps between the marks, in seconds, and the process's peak memory until then, in bytes.

    On a GPU the bytes are those of PyTorch's allocator: `peak` is reserved on the device, `peak_used` is used by
    tensors. On the CPU `peak` is the resident memory of the process.
    """

    cpu_seconds: float
    wall_seconds: float
    peak: int
    peak_used: int | None
    losses: list[float]
    supplied: list[str]  # names that newer libraries have moved
    ready_seconds: float = 0.0  # until the end of the warm-up: reading the models, compiling, the first steps
    profile: dict[str, Any] | None = None  # see training_profile.Profile


class _MeasuredAllError(BaseException):
    """Ends a training after the last measured step; checkpoint and export are not measured."""


class Clock:
    """Called after every step; measures from the end of step `warmup` to the end of step `warmup + steps`."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self._last = warmup + steps
        self._step = 0
        self._start = (0.0, 0.0)
        self._begin, self._ready = time.perf_counter(), 0.0
        self.cpu = self.wall = 0.0
        self.peak: tuple[int, int | None] | None = None  # set at the end

    def tick(self) -> None:
        """A step is done, or on a GPU queued."""
        self._step += 1
        if self._step == self.warmup:
            self._start = _now()
            self._ready = self._start[1] - self._begin
        elif self._step == self._last:
            cpu, wall = _now()
            self.cpu, self.wall = cpu - self._start[0], wall - self._start[1]
            self.peak = peak_memory()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._step

    @property
    def done(self) -> bool:
        """Whether the last step is measured."""
        return self.peak is not None

    def measured(self, losses: list[float], supplied: list[str]) -> Measured:
        """Raises RuntimeError when the training was too short."""
        if self.peak is None:
            raise RuntimeError(f"the training ended after {self._step} of {self._last} steps")
        return Measured(self.cpu, self.wall, *self.peak, losses, supplied, self._ready)


class StepLines(io.TextIOBase):
    """Stands for standard output: the line that tutorial_train.py prints after a step moves the clock."""

    def __init__(self, clock: Clock, stream: TextIO) -> None:
        self._clock, self._stream = clock, stream
        self.losses: list[float] = []

    def write(self, text: str) -> int:
        """Pass the text on."""
        if match := STEP_LINE.match(text):
            self.losses.append(float(match[1]))
            self._clock.tick()
        return self._stream.write(text)


def run_original(checkout: Path, arguments: list[str], clock: Clock) -> Measured:
    """Run tutorial_train.py unchanged."""
    script = checkout / "tutorial_train.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such file; give a checkout of IP-Adapter")
    supplied = supply_moved_names()
    sys.path.insert(0, str(checkout))
    lines = StepLines(clock, sys.stdout)
    kept = sys.argv, sys.stdout
    sys.argv, sys.stdout = [str(script), *arguments], lines
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.stdout = kept
        sys.path.remove(str(checkout))
    return clock.measured(lines.losses, supplied)


def run_ours(overrides: list[str], clock: Clock, tries: Sequence[str] = (), *, to_the_end: bool = True) -> Measured:
    """`ipadapter train key=value ...`, with changes of training_tries. With `profile` among them, the measured steps
    are profiled, which makes their time useless. `to_the_end` includes the last checkpoint and the export.
    """
    from ipadapter_trainer.settings.config import TrainConfig  # noqa: PLC0415
    from ipadapter_trainer.settings.config_file import load_config  # noqa: PLC0415 - only this contender's process has it
    from ipadapter_trainer.training.steps import Progress  # noqa: PLC0415
    from ipadapter_trainer.training.train import train  # noqa: PLC0415

    losses = []
    profile = Profile() if PROFILE in tries else None
    warmup = clock.warmup

    def on_progress(progress: Progress) -> None:
        losses.append(progress.loss)  # a tensor: its value would wait for the device
        clock.tick()
        if profile is not None and clock.step == warmup:
            profile.start()
        if clock.done:
            if profile is not None:
                profile.stop()
            if not to_the_end:
                raise _MeasuredAllError

    for name in tries:
        if name != PROFILE:
            TRIES[name]()
    with suppress(_MeasuredAllError):
        train(load_config(TrainConfig, overrides=overrides), say=print, on_progress=on_progress)
    measured = clock.measured([float(loss) for loss in losses], [])
    return measured if profile is None else replace(measured, profile=profile.summary(clock.steps))


def run_cache(result: str, overrides: list[str]) -> None:
    """`ipadapter cache key=value ...`; the result is the CPU time of this process and its workers."""
    from ipadapter_trainer.cache.write import write_cache  # noqa: PLC0415
    from ipadapter_trainer.settings.config import TrainConfig  # noqa: PLC0415
    from ipadapter_trainer.settings.config_file import load_config  # noqa: PLC0415

    write_cache(load_config(TrainConfig, overrides=overrides), say=print)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    Path(result).write_text(json.dumps(seconds), encoding="utf-8")


def run_contender(result: str, warmup: int, steps: int, arguments: Sequence[str]) -> None:
    """Run one contender and write what was measured: `arguments` are "original", the checkout and the arguments of
    tutorial_train.py, or "ours", overrides and names of training_tries with an @ before them.
    """
    contender, *rest = arguments
    clock = Clock(warmup, steps)
    if contender == "original":
        measured = run_original(Path(rest[0]), rest[1:], clock)
    else:
        tries = [text[1:] for text in rest if text.startswith(TRY)]
        overrides = [text for text in rest if not text.startswith(TRY)]
        measured = run_ours(overrides, clock, tries, to_the_end=False)
    Path(result).write_text(json.dumps(asdict(measured)), encoding="utf-8")


def supply_moved_names() -> list[str]:
    """Give newer versions of diffusers the names that the original imports; returns those that were missing."""
    supplied = []
    for module_name, name, new_name in MOVED_NAMES:
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            setattr(module, name, getattr(importlib.import_module(new_name), name))
            supplied.append(f"{module_name}.{name} (from {new_name})")
    return supplied


def peak_memory() -> tuple[int, int | None]:
    """Bytes so far: see `Measured`."""
    torch = sys.modules.get("torch")  # loaded by every contender
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the process that started this one
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        assert match is not None
        return int(match[1]) * 1024, None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None


def _now() -> tuple[float, float]:
    """CPU time of this process and wall time, when the device has done all queued work."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()
