"""How the speed of a training depends on the resolution, the batch size and the number of processes.

    python benchmarks/training/scaling.py

Each line is `ipadapter train` with a cache, on the tiny model of `benchmarks/training/speed.py`, in processes with one
thread each on a CPU, or one GPU each. Rounds alternate; the numbers are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from training_models import SIZES, write_base_model, write_data

IMAGES, STEPS, WARMUP = 96, 12, 3


@dataclass(frozen=True)
class Run:
    """One setting: the side in pixels, the images a process has at once, and the processes."""

    resolution: int = 128
    batch_size: int = 8
    processes: int = 1

    def __str__(self) -> str:
        word = "process" if self.processes == 1 else "processes"
        return f"{self.resolution:4} px, batch {self.batch_size:2}, {self.processes} {word}"


RUNS = (Run(), Run(resolution=64), Run(resolution=192), Run(batch_size=2), Run(batch_size=16), Run(processes=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(arguments).rounds
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_base_model(scratch / "base", SIZES["tiny"], "cpu")
        write_data(scratch / "data", IMAGES, SIZES["tiny"])
        for resolution in sorted({run.resolution for run in RUNS}):
            _ipadapter("cache", Run(resolution=resolution), scratch, scratch / "unused")
        found: dict[Run, list[float]] = {run: [] for run in RUNS}
        for number in range(rounds):
            for place, run in enumerate(RUNS):
                output = scratch / f"run-{number}-{place}"
                _ipadapter("train", run, scratch, output)
                found[run].append(_speed(output))
    first = statistics.median(found[RUNS[0]])
    print(f"{'':34}images a second    of the first")
    for run, speeds in found.items():
        print(f"{run!s:34}{statistics.median(speeds):15.2f} {statistics.median(speeds) / first:15.2f}")


def _ipadapter(command: str, run: Run, scratch: Path, output: Path) -> None:
    data = next(path for path in (scratch / "data").rglob("*.json*"))
    settings = {
        "base_model": scratch / "base",
        "data": data,
        "output": output,
        "cache": scratch / f"cache-{run.resolution}",
        "resolution": run.resolution,
        "batch_size": run.batch_size,
        "steps": STEPS,
        "num_workers": 1,
        "validation_images": 0,
        "log_every": 1,
        "log_with": "none",
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
    }
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(run.processes)]
    launcher += ["--main_process_port", "0"]
    program = [sys.executable, *(launcher if run.processes > 1 else []), "-m", "ipadapter_trainer.cli", command]
    subprocess.run(
        [*program, *(f"{key}={value}" for key, value in settings.items())],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _speed(output: Path) -> float:
    """Images a second over the steps after the warm-up, of all processes together."""
    lines = [json.loads(line) for line in (output / "log.jsonl").open()]
    seconds = [1 / line["images_per_second"] for line in lines if line["step"] > WARMUP]
    return 1 / statistics.fmean(seconds)


if __name__ == "__main__":
    main()
