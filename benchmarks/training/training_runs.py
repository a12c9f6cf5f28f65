"""The contenders, each run in a process of its own, and the rounds in which they alternate."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training_child import Measured, run_cache, run_contender
from training_processes import ChildError, run_process
from training_tries import TRY

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
    num_workers: int
    device: str  # "cpu" or "cuda"
    threads: int

    @property
    def images(self) -> int:
        """In the steps that are measured."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Contender:
    """`arguments` are those of training_child.run_contender; {output} stands for a folder. An `extra` one runs once,
    after all rounds of the others, and no bar holds for it.
    """

    name: str
    arguments: tuple[str, ...]
    cached: bool = False
    extra: bool = False


@dataclass(frozen=True)
class CacheCost:
    """What `ipadapter cache` took, the reading of the models included, and what it wrote."""

    images: int
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
        "dataloader_num_workers": setup.num_workers,
        "num_train_epochs": 1,
        "mixed_precision": "bf16" if setup.device == "cuda" else "no",
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return Contender(ORIGINAL, ("original", str(checkout), *flags))


def ours(setup: Setup, settings: str = "", cache: Path | None = None, *, extra: bool = False) -> Contender:
    """`ipadapter train` at its defaults, in bf16 on a GPU, without validation, which the original does not have.

    `settings` are more overrides, and names of training_tries with an @ before them, separated by spaces.
    """
    words = settings.split()
    name = ", ".join(("cache" if cache else "no cache", *words))
    more = [f"cache={cache}"] if cache else []
    given = [word.partition("=")[0] for word in words]
    base = [text for text in our_overrides(setup) if text.partition("=")[0] not in given]
    overrides = [*base, *more, *words, "output={output}"]
    return Contender(f"ours, {name}", ("ours", *overrides), cached=cache is not None, extra=extra)


def our_overrides(setup: Setup) -> list[str]:
    """What `ipadapter train` and `ipadapter cache` have in common."""
    return [
        f"base_model={setup.base_model}",
        f"data={setup.data}",
        f"resolution={setup.resolution}",
        f"batch_size={setup.batch_size}",
        f"steps={setup.warmup + setup.steps}",
        f"num_workers={setup.num_workers}",
        f"mixed_precision={'bf16' if setup.device == 'cuda' else 'no'}",
        "validation_images=0",
    ]


def write_cache(setup: Setup, folder: Path) -> CacheCost:
    """Run `ipadapter cache`. Raises RuntimeError when it fails."""
    overrides = [*our_overrides(setup), f"cache={folder}", f"output={folder.with_name('unused')}"]
    result = folder.with_name("cache.json")
    wall = run_process(
        run_cache,
        (str(result), overrides),
        name="ipadapter cache",
        log=folder.with_name("cache.log"),
        device=setup.device,
        threads=setup.threads,
    )
    cpu = json.loads(result.read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return CacheCost(len(json.loads(setup.data.read_text(encoding="utf-8"))), cpu, wall, size)


def measure(setup: Setup, contender: Contender, scratch: Path, limit: float | None = None) -> Measured:
    """One training in a new process. Raises RuntimeError when it fails or takes longer than `limit` seconds."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    result = scratch / "result.json"
    arguments = [
        text if text.startswith(TRY) else text.replace("{output}", str(scratch / "output"))
        for text in contender.arguments
    ]
    run_process(
        run_contender,
        (str(result), setup.warmup, setup.steps, arguments),
        name=contender.name,
        log=scratch / "log",
        device=setup.device,
        threads=setup.threads,
        limit=limit,
    )
    measured = Measured(**json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(scratch)
    return measured


class Budget:
    """Seconds for everything; None has no end."""

    def __init__(self, seconds: float | None, begin: float | None = None) -> None:
        self._seconds, self._begin = seconds, time.perf_counter() if begin is None else begin

    @property
    def left(self) -> float | None:
        """Seconds that are left."""
        return None if self._seconds is None else self._seconds - (time.perf_counter() - self._begin)

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long will end in time."""
        return self.left is None or self.left >= seconds


@dataclass
class Found:
    """What was measured, by contender; and why some contenders were not, or less often."""

    runs: dict[str, list[Measured]] = field(default_factory=dict[str, list[Measured]])
    missing: list[str] = field(default_factory=list[str])


def alternate(
    setup: Setup,
    contenders: Sequence[Contender],
    rounds: int,
    scratch: Path,
    budget: Budget | None = None,
    run: Callable[..., Measured] = measure,
) -> Found:
    """All contenders in every round, then the extra ones once. The order rotates, so that a slow moment does not always
    affect the same one. What would not end within the budget is left out, later rounds and extra ones first. If one
    fails, the others continue.
    """
    budget = budget or Budget(None)
    found, took = Found(), dict[str, float]()

    def one(contender: Contender, what: str) -> None:
        begin = time.perf_counter()
        try:
            measured = run(setup, contender, scratch, budget.left)
        except ChildError as error:
            found.missing.append(str(error))
            _say(f"{what}: {contender.name} failed")
            return
        took[contender.name] = time.perf_counter() - begin
        found.runs.setdefault(contender.name, []).append(measured)
        speed = setup.images / measured.wall_seconds
        _say(
            f"{what}: {contender.name}: {speed:.2f} images/s, {measured.peak / 1e6:,.0f} MB, ready after "
            f"{measured.ready_seconds:.1f} s; {took[contender.name]:.1f} s in all"
        )

    regular = [contender for contender in contenders if not contender.extra]
    for number in range(rounds):
        able = [c for c in regular if number == 0 or c.name in found.runs]
        if not budget.allows(sum(took[c.name] for c in able) if number else 1.0):
            found.missing.append(f"round {number + 1}: left out, for want of time")
            break
        turn = number % max(len(able), 1)
        for contender in (*able[turn:], *able[:turn]):
            one(contender, f"round {number + 1} of {rounds}")
    for contender in contenders:
        if not contender.extra:
            continue
        if budget.allows(min(took.values(), default=1.0)):
            one(contender, "once")
        else:
            found.missing.append(f"{contender.name}: left out, for want of time")
    try:
        check_losses(found.runs)
    except RuntimeError as error:  # the figures are shown, as they took long
        found.missing.append(f"these figures do not count. {error}")
    return found


def check_losses(found: Mapping[str, Sequence[Measured]]) -> None:
    """Raises RuntimeError if mean losses differ: a contender that computes something else must not count as fast."""
    means = {name: statistics.mean(loss for run in runs for loss in run.losses) for name, runs in found.items()}
    wanted = next(iter(means.values()), 1.0)
    for name, mean in means.items():
        if not math.isfinite(mean) or abs(mean / wanted - 1) > LOSS_TOLERANCE:
            raise RuntimeError(f"{name}: its mean loss is {mean:.4f}, but another contender's is {wanted:.4f}.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
