"""The contenders, each run in a process of its own, and the rounds in which they alternate."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training_child import Measured

CHILD = Path(__file__).with_name("training_child.py")
COMMAND = "from ipadapter_trainer.cli import main; main()"
ORIGINAL = "original"
LOSS_TOLERANCE = 0.1  # random models start at a loss near 1, whatever the draws


@dataclass(frozen=True)
class Setup:
    """What all contenders share. `base_model` holds its image encoder; `threads` 0 leaves them to PyTorch."""

    base_model: Path
    data: Path
    resolution: int
    batch_size: int
    warmup: int
    steps: int
    workers: int
    device: str  # "cpu" or "cuda"
    threads: int

    @property
    def images(self) -> int:
        """In the steps that are measured."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Contender:
    """`arguments` are those of training_child.py from the contender's word on; {output} stands for a folder."""

    name: str
    arguments: tuple[str, ...]
    cached: bool = False


@dataclass(frozen=True)
class CacheCost:
    """What `ipadapter cache` took, start of the process included, and what it wrote."""

    pictures: int
    cpu_seconds: float
    wall_seconds: float
    bytes: int


def original(setup: Setup, checkout: Path) -> Contender:
    """tutorial_train.py at its defaults, in bf16 on a GPU; one pass over the data."""
    arguments = {
        "pretrained_model_name_or_path": setup.base_model,
        "image_encoder_path": setup.base_model / "image_encoder",
        "data_json_file": setup.data,
        "data_root_path": setup.data.parent,
        "output_dir": "{output}",
        "resolution": setup.resolution,
        "train_batch_size": setup.batch_size,
        "dataloader_num_workers": setup.workers,
        "num_train_epochs": 1,
        "mixed_precision": "bf16" if setup.device == "cuda" else "no",
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return Contender(ORIGINAL, ("original", str(checkout), *flags))


def ours(setup: Setup, settings: str = "", cache: Path | None = None) -> Contender:
    """`ipadapter train` at its defaults, in bf16 on a GPU, without the validation that the original has not.

    `settings` are more overrides, separated by spaces.
    """
    name = ", ".join(("cache" if cache else "no cache", *settings.split()))
    more = [f"cache={cache}"] if cache else []
    overrides = [*our_overrides(setup), *more, *settings.split(), "output={output}"]
    return Contender(f"ours, {name}", ("ours", *overrides), cached=cache is not None)


def our_overrides(setup: Setup) -> list[str]:
    """What `ipadapter train` and `ipadapter cache` have in common."""
    return [
        f"base_model={setup.base_model}",
        f"data={setup.data}",
        f"resolution={setup.resolution}",
        f"batch_size={setup.batch_size}",
        f"steps={setup.warmup + setup.steps}",
        f"workers={setup.workers}",
        f"mixed_precision={'bf16' if setup.device == 'cuda' else 'no'}",
        "validation_pictures=0",
    ]


def write_cache(setup: Setup, folder: Path) -> CacheCost:
    """Run `ipadapter cache`. Raises RuntimeError when it fails."""
    overrides = [*our_overrides(setup), f"cache={folder}", f"output={folder.with_name('unused')}"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    _run([sys.executable, "-c", COMMAND, "cache", *overrides], setup)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return CacheCost(len(json.loads(setup.data.read_text(encoding="utf-8"))), cpu, wall, size)


def measure(setup: Setup, contender: Contender, scratch: Path) -> Measured:
    """One training in a new process. Raises RuntimeError when it fails."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    result = scratch / "result.json"
    arguments = [text.replace("{output}", str(scratch / "output")) for text in contender.arguments]
    _run([sys.executable, str(CHILD), str(result), str(setup.warmup), str(setup.steps), *arguments], setup)
    measured = Measured(**json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(scratch)
    return measured


def alternate(setup: Setup, contenders: Sequence[Contender], rounds: int, scratch: Path) -> dict[str, list[Measured]]:
    """All contenders in every round. The order rotates, so that a slow moment does not always meet the same one."""
    found: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            print(f"round {number + 1} of {rounds}: {contender.name}", file=sys.stderr, flush=True)
            found[contender.name].append(measure(setup, contender, scratch))
    check_losses(found)
    return found


def check_losses(found: Mapping[str, Sequence[Measured]]) -> None:
    """A contender that computes something else would be fast for the wrong reason: raises RuntimeError."""
    means = {name: statistics.mean(loss for run in runs for loss in run.losses) for name, runs in found.items()}
    wanted = next(iter(means.values()))
    for name, mean in means.items():
        if not math.isfinite(mean) or abs(mean / wanted - 1) > LOSS_TOLERANCE:
            raise RuntimeError(f"{name}: its mean loss is {mean:.4f}, but another contender's is {wanted:.4f}.")


def _run(command: Sequence[str], setup: Setup) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if setup.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if setup.threads:
        environment |= {"OMP_NUM_THREADS": str(setup.threads), "MKL_NUM_THREADS": str(setup.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise RuntimeError(f"{' '.join(command[:3])} ... ended with code {done.returncode}:\n{tail}")
