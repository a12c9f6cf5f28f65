"""How fast `ipadapter train` is, with the cache and without, beside the original's tutorial_train.py.

    python benchmarks/training.py --original PATH/TO/IP-Adapter [--json FILE]       # minutes on a CPU
    python benchmarks/training.py --original PATH/TO/IP-Adapter --size sd15          # on a GPU

Needs no model files: all weights are random. The original needs torchvision and einops beside the packages of
`ip-adapter-kit[train]`. Exit code 1 when a bar is missed. MB are 10^6 bytes.

How to read the figures:

* Each contender is a process of its own, with the same base model, pictures, captions and batch size. They take
  turns; a ratio is the median over the rounds of the ratio within a round.
* The original's code runs as it is. Names that it imports from places where diffusers had them years ago are
  supplied in its process, and printed.
* Images a second are from the end of the warm-up steps to the end of the last one: start-up, checkpoints and exports
  are in nobody's time. Reading pictures, the optimizer and the logs are.
* The tiny size has all layers of SD1.5's UNet and VAE at a fifth of their width, and text and image encoders so small
  that each part's share of the arithmetic is about that of SD1.5 at 512 px; both are printed. What the cache saves
  depends on these shares.
* On the CPU the bar is on CPU time, in one thread and without loader processes: other programs disturb it less than
  wall time. All is float32, both defaults there. Memory is the peak of the resident memory, of which the libraries
  alone are the most at this size, so there is no bar on it.
* On a GPU both train in bf16: the original's --mixed_precision bf16, our mixed_precision=bf16. Memory is the most
  that PyTorch's allocator held of the device; --json has what tensors took of it too.
* Both use their other defaults, but for our validation, which the original has not. --settings tries more of ours.
* Writing the cache is a cost of its own, once for all trainings on the same pictures, and is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from training_models import SIZES, part_flops, write_base_model, write_data
from training_runs import CacheCost, Contender, Setup, alternate, original, ours, write_cache
from training_table import Row, render, rows_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    args = _arguments(arguments)
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        setup = _setup(args, scratch)
        print(_heading(args, setup), flush=True)
        cost = write_cache(setup, scratch / "cache")
        contenders = _contenders(args, setup, scratch / "cache")
        found = alternate(setup, contenders, args.rounds, scratch / "run")
    supplied = sorted({line for runs in found.values() for run in runs for line in run.supplied})
    judged = (args.size == "sd15") == (setup.device == "cuda")
    rows = rows_of(found, contenders, setup, judged=judged)
    print("\n".join(f"Supplied to the original: {line}" for line in supplied))
    print("\n" + render(rows) + "\n\n" + _cost_text(cost))
    missed = missed_bars(rows)
    print("\nMissed: " + "; ".join(missed) if missed else "\nEvery bar that could be judged is met.")
    if args.json:
        result = {
            "device": _device_name(setup.device),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "size": {"name": args.size, **asdict(SIZES[args.size])},
            "flops": part_flops(SIZES[args.size]),
            "setup": {key: value for key, value in asdict(setup).items() if not isinstance(value, Path)},
            "supplied": supplied,
            "cache": asdict(cost),
            "rows": [row.as_json() for row in rows],
            "runs": {name: [asdict(run) for run in runs] for name, runs in found.items()},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if missed else 0


def _setup(args: argparse.Namespace, scratch: Path) -> Setup:
    """Write the base model and the pictures, as many as the steps need."""
    size = SIZES[args.size]
    count = (args.warmup + args.steps) * args.batch_size
    return Setup(
        base_model=write_base_model(scratch / "base", size, args.device),
        data=write_data(scratch / "data", count, size),
        resolution=size.resolution,
        batch_size=args.batch_size,
        warmup=args.warmup,
        steps=args.steps,
        workers=args.workers,
        device=args.device,
        threads=args.threads,
    )


def _contenders(args: argparse.Namespace, setup: Setup, cache: Path) -> list[Contender]:
    theirs = [original(setup, args.original.resolve())] if args.original else []
    pairs = [ours(setup, settings, folder) for settings in args.settings for folder in (None, cache)]
    return [*theirs, *pairs]


def missed_bars(rows: Sequence[Row]) -> list[str]:
    """A bar holds for the best of our settings."""
    missed = []
    for bar in {row.bar for row in rows if row.bar}:
        judged = [row for row in rows if row.bar == bar]
        if not any(row.met or row.met is None for row in judged):
            missed.append(f"{bar} ({', '.join(row.name for row in judged)})")
    return sorted(missed)


def _heading(args: argparse.Namespace, setup: Setup) -> str:
    threads = f", {setup.threads} thread(s)" if setup.threads else ""
    return "\n".join(
        [
            f"{_device_name(setup.device)}{threads}; torch {torch.__version__}, diffusers {diffusers.__version__}",
            f"{args.size}: {setup.resolution} px, batches of {setup.batch_size}, {setup.steps} steps after "
            f"{setup.warmup} of warm-up, {args.rounds} rounds, {setup.workers} loader processes",
            _shares_text(args.size, part_flops(SIZES[args.size])),
            *([] if args.size == "sd15" else [_shares_text("SD1.5", part_flops(SIZES["sd15"]))]),
        ]
    )


def _shares_text(name: str, flops: Mapping[str, int]) -> str:
    total = sum(flops.values())
    shares = ", ".join(f"{part} {count / total:.1%}" for part, count in flops.items())
    return f"{name}, arithmetic of a step: {shares} of {total / 1e9:,.1f} GFLOP a picture"


def _cost_text(cost: CacheCost) -> str:
    return (
        f"Writing the cache of {cost.pictures} pictures took {cost.wall_seconds:.1f} s ({cost.cpu_seconds:.1f} s of "
        f"CPU time), start of the process included; it is {cost.bytes / cost.pictures / 1e3:,.1f} kB a picture."
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast the trainer is, beside the original's.")
    where = os.environ.get("IP_ADAPTER_PATH")
    parser.add_argument(
        "--original",
        type=Path,
        default=where and Path(where),
        help="a checkout of tencent-ailab/IP-Adapter; default: $IP_ADAPTER_PATH; without it ours alone is measured",
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="sd15 is the real one and needs a GPU")
    parser.add_argument("--settings", action="append", help='more settings of ours, such as "compile=true"; repeatable')
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step; 8 is the original's default")
    parser.add_argument("--warmup", type=int, help="steps before the clock starts; default: 2, on a GPU 20")
    parser.add_argument("--steps", type=int, help="measured steps; default: 10, on a GPU 50")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--workers", type=int, help="loader processes of each; default: 0, on a GPU 4")
    parser.add_argument("--threads", type=int, help="of torch; default: 1, on a GPU PyTorch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--scratch", type=Path, help="folder for the models and pictures; sd15 takes 7 GB for a while")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = args.device == "cuda"
    for name, on_cpu, on_gpu in (("warmup", 2, 20), ("steps", 10, 50), ("workers", 0, 4), ("threads", 1, 0)):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    args.settings = args.settings or (["", "compile=true"] if gpu else [""])
    if args.original and not (args.original / "tutorial_train.py").is_file():
        parser.error(f"{args.original} is no checkout of IP-Adapter (it has no tutorial_train.py).")
    if args.warmup < 1:
        parser.error("--warmup must be at least 1: the first step starts everything up.")
    return args


if __name__ == "__main__":
    sys.exit(main())
