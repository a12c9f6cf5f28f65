"""One contender's training, in a process of its own: what a step takes, and the peak of the memory.

python benchmarks/training_child.py RESULT.json WARMUP STEPS original CHECKOUT [arguments of tutorial_train.py]
python benchmarks/training_child.py RESULT.json WARMUP STEPS ours [key=value ...]
"""

from __future__ import annotations

import importlib
import io
import json
import re
import resource
import runpy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

# What tutorial_train.py's package imports, and where diffusers has it now: module, name, module of today.
MOVED_NAMES = (
    ("diffusers.pipelines.controlnet", "MultiControlNetModel", "diffusers.models.controlnets.multicontrolnet"),
)
STEP_LINE = re.compile(r"Epoch \d+, step \d+, .*step_loss: (\S+)")


@dataclass(frozen=True)
class Measured:
    """The steps between the marks, in seconds, and the process's peak memory until then, in bytes.

    On a GPU the bytes are those of PyTorch's allocator: `peak` what it holds of the device, `peak_used` what tensors
    take of it. On the CPU `peak` is the resident memory of the process.
    """

    cpu_seconds: float
    wall_seconds: float
    peak: int
    peak_used: int | None
    losses: list[float]
    supplied: list[str]  # names that the libraries of today have elsewhere


class Clock:
    """Called after every step; measures from the end of step `warmup` to the end of step `warmup + steps`."""

    def __init__(self, warmup: int, steps: int) -> None:
        self._warmup, self._last = warmup, warmup + steps
        self._step = 0
        self._start = (0.0, 0.0)
        self.cpu = self.wall = 0.0
        self.peak: tuple[int, int | None] | None = None  # set at the end

    def tick(self) -> None:
        """A step is done, or on a GPU queued."""
        self._step += 1
        if self._step == self._warmup:
            self._start = _now()
        elif self._step == self._last:
            cpu, wall = _now()
            self.cpu, self.wall = cpu - self._start[0], wall - self._start[1]
            self.peak = peak_memory()

    def measured(self, losses: list[float], supplied: list[str]) -> Measured:
        """Raises RuntimeError when the training was too short."""
        if self.peak is None:
            raise RuntimeError(f"the training ended after {self._step} of {self._last} steps")
        return Measured(self.cpu, self.wall, *self.peak, losses, supplied)


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
    """tutorial_train.py as it is, beside its package."""
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


def run_ours(overrides: list[str], clock: Clock) -> Measured:
    """`ipadapter train key=value ...`."""
    from ipadapter_trainer.engine.denoiser import Progress  # noqa: PLC0415
    from ipadapter_trainer.settings.config_file import load_config  # noqa: PLC0415 - only this contender's process has it
    from ipadapter_trainer.training.train import train  # noqa: PLC0415

    losses = []

    def on_progress(progress: Progress) -> None:
        losses.append(progress.loss)  # a tensor: its value would wait for the device
        clock.tick()

    train(load_config(overrides=overrides), say=print, on_progress=on_progress)
    return clock.measured([float(loss) for loss in losses], [])


def supply_moved_names() -> list[str]:
    """Give today's diffusers the names that the original imports; returns what was missing."""
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


def main() -> None:
    """Run one contender and write what was measured."""
    result, warmup, steps, contender, *arguments = sys.argv[1:]
    clock = Clock(int(warmup), int(steps))
    if contender == "original":
        measured = run_original(Path(arguments[0]), arguments[1:], clock)
    else:
        measured = run_ours(arguments, clock)
    Path(result).write_text(json.dumps(asdict(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
