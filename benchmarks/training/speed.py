"""The speed of `ipadapter train`, with and without a cache, compared with the original's tutorial_train.py.

    python benchmarks/training/speed.py --original PATH/TO/IP-Adapter [--json FILE]       # minutes on a CPU
    python benchmarks/training/speed.py --original PATH/TO/IP-Adapter --size sd15          # on a GPU
    python benchmarks/training/speed.py --size sdxl                                        # on a GPU, only ours

Needs no model files: all weights are random. The original also needs torchvision and einops.
Exit code 1 when a goal ("bar") is missed or a contender fails. MB are 10^6 bytes.

How to read the figures:

* Each contender is a process of its own, with the same base model, images, captions and batch size. They take
  turns; a ratio is the median over the rounds of the ratio within a round.
* The original's code is not changed. Names that newer versions of diffusers have moved are supplied in its process,
  and printed.
* Images per second are measured from the end of the warm-up steps to the end of the last step. This includes loading
  images, the optimizer and the logs; it excludes start-up, checkpoints and exports.
* "ready s" are the seconds from the start of a process, which has the libraries imported already, to the end of the
  warm-up: loading the models and the first steps. With compile=true it includes the compilation.
* The tiny size has all layers of SD1.5's UNet and VAE at a fifth of their width, and text and image encoders so small
  that each part's share of the FLOPs is about that of SD1.5 at 512 px; both are printed. What the cache saves depends
  on these shares. tiny-sdxl is only for trying things out.
* On the CPU the goal is for CPU time, in one thread and without loader processes, because other programs disturb it
  less than wall time. Both use float32, their default there. Memory is the peak of the resident memory; at this size
  most of it is taken by the libraries, so there is no goal for it.
* On a GPU both train in bf16: the original's --mixed_precision bf16, our mixed_precision=bf16. Memory is the
  peak that PyTorch's allocator reserved on the device; --json also has the peak that tensors used.
* Otherwise both use their defaults, except that our validation is off, because the original has none. --settings adds
  rows with other settings of ours.
* --extra runs further settings of ours once each, with the cache, after all rounds. No goal applies to them, and their
  ratios are to the original's first round. On a GPU the settings that save memory are run by default.
* `@contiguous`, `@autocast` and `@cudnn_benchmark` among the settings change our code instead (training_tries.py), to
  compare it with alternatives.
* --profile profiles the steps of two more runs, without and with the cache: which kernels take the time, and how much
  of the time the GPU is busy. If that is well below 100 %, the CPU launches kernels too slowly.
* --budget leaves out what would not end in time, later rounds and extra settings first, and lists it.
* The cost of writing the cache is printed separately; it is paid once for all trainings on the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from training_processes import start_server

if TYPE_CHECKING:
    from training_runs import CacheCost, Contender, Found, Setup
    from training_table import Row

SIZES = ("tiny", "sd15", "tiny-sdxl", "sdxl")
EXTRAS = {  # the most telling first: a budget may end before the last
    "sd15": (
        "@contiguous",
        "compile=true",
        "gradient_checkpointing=true",
        "optimizer=adamw8bit",
        "mixed_precision=fp8",
        "mixed_precision=fp16",
    ),
    "sdxl": ("gradient_checkpointing=true",),
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    begin = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(parser, args)
    start_server()  # before the libraries are imported here: both take seconds
    _fill_in(args)
    from training_runs import Budget, alternate, write_cache  # noqa: PLC0415
    from training_table import render, rows_of  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        setup = _setup(args, scratch)
        print(_heading(args, setup), flush=True)
        cost = write_cache(setup, scratch / "cache")
        contenders = _contenders(args, setup, scratch / "cache")
        print(f"Ready after {time.perf_counter() - begin:.1f} s.", file=sys.stderr, flush=True)
        found = alternate(setup, contenders, args.rounds, scratch / "run", Budget(args.budget, begin))
    supplied = sorted({line for runs in found.runs.values() for run in runs for line in run.supplied})
    judged = (args.size == "sd15") == (setup.device == "cuda")
    timed = [contender for contender in contenders if not _profiled(contender, found)]
    rows = rows_of(found.runs, timed, setup, judged=judged)
    print("\n".join(f"Supplied to the original: {line}" for line in supplied))
    print("\n" + render(rows) + "\n\n" + _cost_text(cost))
    for text in _profiles(found):
        print("\n" + text)
    missed = missed_bars(rows)
    print("\nMissed: " + "; ".join(missed) if missed else "\nEvery bar that could be judged is met.")
    for line in found.missing:
        print(f"Not measured: {line}")
    if args.json:
        args.json.write_text(json.dumps(_result(args, setup, cost, rows, found, supplied), indent=2) + "\n")
    return 1 if missed or found.missing else 0


def _result(
    args: argparse.Namespace,
    setup: Setup,
    cost: CacheCost,
    rows: Sequence[Row],
    found: Found,
    supplied: Sequence[str],
) -> dict[str, object]:
    from training_models import SIZES as SHAPES  # noqa: PLC0415
    from training_models import part_flops  # noqa: PLC0415

    return {
        "device": _device_name(setup.device),
        **{name: version(name) for name in PACKAGES},
        "size": {"name": args.size, **asdict(SHAPES[args.size])},
        "flops": part_flops(SHAPES[args.size]),
        "setup": {key: value for key, value in asdict(setup).items() if not isinstance(value, Path)},
        "supplied": supplied,
        "cache": asdict(cost),
        "rows": [row.as_json() for row in rows],
        "runs": {name: [asdict(run) for run in runs] for name, runs in found.runs.items()},
        "missing": found.missing,
    }


def _setup(args: argparse.Namespace, scratch: Path) -> Setup:
    """Write the base model and the images, as many as the steps need."""
    from training_models import SIZES as SHAPES  # noqa: PLC0415
    from training_models import write_base_model, write_data  # noqa: PLC0415
    from training_runs import Setup  # noqa: PLC0415

    size = SHAPES[args.size]
    count = (args.warmup + args.steps) * args.batch_size
    return Setup(
        base_model=write_base_model(scratch / "base", size, args.device),
        data=write_data(scratch / "data", count, size),
        resolution=size.resolution,
        batch_size=args.batch_size,
        warmup=args.warmup,
        steps=args.steps,
        num_workers=args.num_workers,
        device=args.device,
        threads=args.threads,
    )


def _contenders(args: argparse.Namespace, setup: Setup, cache: Path) -> list[Contender]:
    from training_runs import original, ours  # noqa: PLC0415
    from training_tries import PROFILE, TRY  # noqa: PLC0415

    theirs = [original(setup, args.original.resolve())] if args.original else []
    folders = (cache,) if args.cache_only else (None, cache)
    pairs = [ours(setup, settings, folder) for settings in args.settings for folder in folders]
    profiles = [ours(setup, TRY + PROFILE, folder, extra=True) for folder in folders] if args.profile else []
    return [*theirs, *pairs, *profiles, *(ours(setup, settings, cache, extra=True) for settings in args.extra)]


def _profiled(contender: Contender, found: Found) -> bool:
    return any(run.profile is not None for run in found.runs.get(contender.name, ()))


def _profiles(found: Found) -> list[str]:
    from training_profile import profile_text  # noqa: PLC0415

    runs = [(name, run) for name, named in found.runs.items() for run in named if run.profile is not None]
    return [profile_text(name, run.profile) for name, run in runs if run.profile is not None]


def missed_bars(rows: Sequence[Row]) -> list[str]:
    """The bars that none of our settings meets."""
    missed = []
    for bar in {row.bar for row in rows if row.bar}:
        judged = [row for row in rows if row.bar == bar]
        if not any(row.met or row.met is None for row in judged):
            missed.append(f"{bar} ({', '.join(row.name for row in judged)})")
    return sorted(missed)


def _heading(args: argparse.Namespace, setup: Setup) -> str:
    from training_models import SIZES as SHAPES  # noqa: PLC0415
    from training_models import part_flops  # noqa: PLC0415

    threads = f", {setup.threads} thread(s)" if setup.threads else ""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            f"{_device_name(setup.device)}{threads}; {versions}",
            f"{args.size}: {setup.resolution} px, batches of {setup.batch_size}, {setup.steps} steps after "
            f"{setup.warmup} of warm-up, {args.rounds} round(s), {setup.num_workers} loader processes",
            _shares_text(args.size, part_flops(SHAPES[args.size])),
            *([_shares_text("SD1.5", part_flops(SHAPES["sd15"]))] if args.size == "tiny" else []),
        ]
    )


def _shares_text(name: str, flops: Mapping[str, int]) -> str:
    total = sum(flops.values())
    shares = ", ".join(f"{part} {count / total:.1%}" for part, count in flops.items())
    return f"{name}, arithmetic of a step: {shares} of {total / 1e9:,.1f} GFLOP an image"


def _cost_text(cost: CacheCost) -> str:
    return (
        f"Writing the cache of {cost.images} images took {cost.wall_seconds:.1f} s ({cost.cpu_seconds:.1f} s of "
        f"CPU time), reading the models included; it is {cost.bytes / cost.images / 1e3:,.1f} kB an image."
    )


def _device_name(device: str) -> str:
    import torch  # noqa: PLC0415

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The speed of the trainer, compared with the original's.")
    where = os.environ.get("IP_ADAPTER_PATH")
    parser.add_argument(
        "--original",
        type=Path,
        default=where and Path(where),
        help="a checkout of tencent-ailab/IP-Adapter; default: $IP_ADAPTER_PATH; without it ours alone is measured",
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="sd15 and sdxl are the real ones and need a GPU")
    parser.add_argument("--settings", action="append", help='more settings of ours, such as "compile=true"; repeatable')
    parser.add_argument(
        "--extra",
        action="append",
        help="settings of ours to run once with the cache, without a bar; repeatable; none: none of the defaults",
    )
    parser.add_argument("--cache-only", action="store_true", help="leave out ours without the cache; always with sdxl")
    parser.add_argument("--profile", action="store_true", help="also profile the steps, without the cache and with it")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a step; 8 is the original's default")
    parser.add_argument("--warmup", type=int, help="steps before the clock starts; default: 2, on a GPU 20")
    parser.add_argument("--steps", type=int, help="measured steps; default: 10, on a GPU 50")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender but the extra ones")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    parser.add_argument("--num-workers", type=int, help="loader processes of each; default: 0, on a GPU 4")
    parser.add_argument("--threads", type=int, help="of torch; default: 1, on a GPU PyTorch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for the models and images, such as /dev/shm; sd15 takes 4 GB for a while, sdxl 9 GB",
    )
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.size.endswith("sdxl"):
        args.original = None  # its SDXL training is another script
        args.cache_only = True
    if args.original and not (args.original / "tutorial_train.py").is_file():
        parser.error(f"{args.original} is no checkout of IP-Adapter (it has no tutorial_train.py).")
    if args.warmup is not None and args.warmup < 1:
        parser.error("--warmup must be at least 1: the first step starts everything up.")


def _fill_in(args: argparse.Namespace) -> None:
    """The defaults that depend on the device."""
    import torch  # noqa: PLC0415

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = args.device == "cuda"
    for name, on_cpu, on_gpu in (("warmup", 2, 20), ("steps", 10, 50), ("num_workers", 0, 4), ("threads", 1, 0)):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    args.settings = args.settings or [""]
    extra = (EXTRAS.get(args.size, ()) if gpu else ()) if args.extra is None else args.extra
    args.extra = [settings for settings in extra if settings != "none"]


if __name__ == "__main__":
    sys.exit(main())
