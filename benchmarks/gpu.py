"""Every figure that needs a GPU, one part after another. A part that fails or takes too long does not stop the others.

    python benchmarks/gpu.py --original PATH/TO/IP-Adapter --comfyui PATH/TO/ComfyUI [--peer PATH] \
        --images pictures.zip [--drawings drawings.zip] --out results
    python benchmarks/gpu.py ... --check                                  # every part at a tiny size: does it start?
    python benchmarks/gpu.py ... --parts training-sd15,comfyui --limit training-sd15=300

Parts: training-sd15 and training-sdxl (training/speed.py), comfyui (comfyui/overhead.py), emoji (training/emoji.py).
Each is a process of its own with a time limit; all limits together are 12 minutes. Within its limit speed.py leaves out
what does not fit, and emoji.py trains for as long as is left. A part's table is in OUT/<part>.txt, its progress and
errors in OUT/<part>.log, its figures in OUT/<part>.json, but those of emoji in OUT/emoji; the tables are printed
together at the end. Exit code 1 when a part fails or misses a bar. --check works on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
GRACE = 20  # seconds between the end of a training's budget and its limit
FULL = ("--num-workers", "8")
SD15 = ("--rounds", "2", "--warmup", "8", "--steps", "24")
SDXL = ("--rounds", "1", "--batch-size", "4", "--warmup", "5", "--steps", "15")
FEW = ("--warmup", "1", "--steps", "2", "--batch-size", "2", "--rounds", "1", "--num-workers", "2")


@dataclass(frozen=True)
class Part:
    """`command` makes the arguments of a run, of a tiny one with --check, from the options and the limit in seconds;
    None: it cannot run without the option that `needs` names. `check` is the limit of a tiny one, on a busy CPU too.
    """

    command: Callable[[argparse.Namespace, int], list[str] | None]
    limit: int
    needs: str = ""
    check: int = 120


@dataclass(frozen=True)
class Outcome:
    """A part that was run; `code` is None when it was ended at its limit."""

    name: str
    code: int | None
    seconds: float
    text: str

    @property
    def heading(self) -> str:
        """A line for people."""
        how = "ended at its time limit" if self.code is None else "done" if self.code == 0 else f"exit code {self.code}"
        return f"=== {self.name}: {how}, {self.seconds:.0f} s"


def _training(args: argparse.Namespace, family: str, limit: int, *more: str, tiny: str) -> list[str]:
    scratch = ["--scratch", str(args.scratch)] if args.scratch else []
    against = ["--original", str(args.original)] if args.original and family == "sd15" else []
    size, budget = tiny if args.check else family, str(limit - GRACE)
    options = ["--size", size, "--budget", budget, *_json(args, f"training-{family}"), *against, *scratch, *more]
    return [str(HERE / "training" / "speed.py"), *options]


def _json(args: argparse.Namespace, name: str) -> list[str]:
    return ["--json", str(args.out / f"{name}.json")]


def _sd15(args: argparse.Namespace, limit: int) -> list[str]:
    extras = ["mixed_precision=fp8", *(["mixed_precision=fp16", "optimizer=adamw8bit"] if _gpu() else [])]
    few = (*FEW, *(text for extra in extras for text in ("--extra", extra)))
    how = few if args.check else (*FULL, *SD15)
    return _training(args, "sd15", limit, *how, "--profile", tiny="tiny")


def _sdxl(args: argparse.Namespace, limit: int) -> list[str]:
    how = (*FEW, "--extra", "gradient_checkpointing=true") if args.check else (*FULL, *SDXL)
    return _training(args, "sdxl", limit, *how, tiny="tiny-sdxl")


def _comfyui(args: argparse.Namespace, limit: int) -> list[str] | None:
    if not args.comfyui:
        return None
    peer = ["--peer", str(args.peer)] if args.peer and not args.check else []
    device = ["--device", "cuda"] if _gpu() else []
    few = ["--repeats", "1", "--apply-repeats", "1", "--steps", "2"] if args.check else []
    profile = ["--profile"] if device and not args.check else []
    options = ["--comfyui", str(args.comfyui), *peer, *device, *few, *profile, *_json(args, "comfyui")]
    return [str(HERE / "comfyui" / "overhead.py"), *options]


def _emoji(args: argparse.Namespace, limit: int) -> list[str] | None:
    if not args.images:
        return None
    more = ["--drawings", str(args.drawings)] if args.drawings else []
    how = ["--check"] if args.check else ["--budget", str(limit - GRACE)]
    options = ["--images", str(args.images), "--output", str(args.out / "emoji"), *more, *how]
    return [str(HERE / "training" / "emoji.py"), *options]


# In the order in which they run. One part more is one entry more.
PARTS: Mapping[str, Part] = {
    "training-sd15": Part(_sd15, limit=200),
    "training-sdxl": Part(_sdxl, limit=90),
    "comfyui": Part(_comfyui, limit=150, needs="--comfyui"),
    "emoji": Part(_emoji, limit=280, needs="--images", check=900),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print their tables, and return the exit code."""
    args = _arguments(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in args.parts:
        part = PARTS[name]
        limit = args.limits.get(name, part.check if args.check else part.limit)
        command = part.command(args, limit)
        if command is None:
            outcomes.append(Outcome(name, 2, 0.0, f"Left out: it needs {part.needs}.\n"))
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcomes.append(run(name, [sys.executable, *command], args.out, limit))
        print(outcomes[-1].heading, file=sys.stderr, flush=True)
    for outcome in outcomes:
        print(f"\n{outcome.heading}\n\n{outcome.text.rstrip()}")
    return 1 if any(outcome.code != 0 for outcome in outcomes) else 0


def run(name: str, command: Sequence[str], out: Path, limit: float) -> Outcome:
    """Run a command until it ends or for `limit` seconds, and keep what it prints. One that fails shows its errors."""
    begin = time.perf_counter()
    text, log = out / f"{name}.txt", out / f"{name}.log"
    with text.open("w", encoding="utf-8") as printed, log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, stdout=printed, stderr=said, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
    shown = text.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown += "\n".join(["", f"The end of {log.name}:", *lines[-25:], ""])
    return Outcome(name, code, time.perf_counter() - begin, shown)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _gpu() -> bool:
    import torch  # noqa: PLC0415

    return torch.cuda.is_available()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every figure that needs a GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, in this order")
    parser.add_argument("--limit", action="append", default=[], help="PART=SECONDS, for another limit; repeatable")
    parser.add_argument("--check", action="store_true", help="every part at a tiny size")
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="folder for tables, logs and JSON")
    parser.add_argument("--original", type=Path, help="a checkout of tencent-ailab/IP-Adapter, for training-sd15")
    where = os.environ.get("COMFYUI_PATH")
    parser.add_argument(
        "--comfyui", type=Path, default=where and Path(where), help="a ComfyUI checkout; default: $COMFYUI_PATH"
    )
    parser.add_argument("--peer", type=Path, help="a ComfyUI_IPAdapter_plus checkout, for comfyui")
    parser.add_argument("--images", type=Path, help="pictures.zip of tools.emoji.build, for emoji")
    parser.add_argument("--drawings", type=Path, help="drawings.zip of tools.emoji.drawings, for emoji")
    parser.add_argument("--scratch", type=Path, help="folder for the training's models and images, such as /dev/shm")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    try:
        args.limits = {name: int(seconds) for name, seconds in (text.split("=") for text in args.limit)}
    except ValueError:
        parser.error(f"--limit is PART=SECONDS, such as comfyui=120 (it is {' '.join(args.limit)}).")
    if unknown := [name for name in (*args.parts, *args.limits) if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; parts are {', '.join(PARTS)}.")
    return args


if __name__ == "__main__":
    sys.exit(main())
