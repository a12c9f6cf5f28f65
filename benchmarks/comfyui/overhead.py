"""What an image prompt costs in a real ComfyUI: no adapter against Apply IP Adapter against ComfyUI_IPAdapter_plus.

    python benchmarks/comfyui/overhead.py --comfyui PATH [--peer PATH] [--old-names] [--json FILE]
    python benchmarks/comfyui/overhead.py --comfyui PATH [--peer PATH] --device cuda [--profile]

Runs with the Python of that ComfyUI, in one process, and needs no model files: all weights are random. Exit code 1
when a bar is missed. MB are 10^6 bytes.

On a GPU (--device cuda) all is real size: SDXL at 1024 px with both branches in one batch, fp16, PyTorch's attention,
a plus adapter of 16 tokens; for the frames SD1.5 at 256 px. A step is timed on the GPU's clock in the middle of a run.
"launches" are kernels, copies and fills. Memory is that of a run beside the UNet's weights, after ComfyUI has dropped
the applied adapter's, which it may; the peer's attention needs its adapter's weights on the GPU.

How to read the figures on the CPU:

* Apply, clones and held bytes: SDXL at its real widths (a UNet of shapes without weights), a plus adapter of 16
  tokens in its real size. The peer's Apply runs the image projector each time, ours does not: Encode Image Prompt did
  it once. The bar is on Apply against Apply; the row below adds our projection. The model is fp32, as everywhere on
  the CPU. An fp16 file makes the peer convert all weights, an fp32 file makes it convert none, as with an fp16 file
  and an fp16 model on a GPU. The time of ours is that of its matrix products; the peer's is mostly random initial
  values that it then replaces.
* Held bytes: what the patched MODEL keeps alive and the base MODEL does not. The peer's includes the adapter's own
  weights, since its attention needs them in every step; ours stay with the loader, where ComfyUI may unload them.
* Steps: UNets with all layers of their family but narrow, and a small latent, so that a step is short. The text and
  image tokens keep their real width, which makes the peer's matrix products weigh more than in a real UNet; the
  counted calls do not depend on widths. A step is a whole run divided by its steps: what a run does once is in it.
* Calls: composite operators are counted as the calls that they consist of. The row below counts them whole, as torch
  shows them in inference mode; there the peer's linear layers look as cheap as a transpose.
* The peer patches 70 layers of SDXL and 60 of them fire (16 and 15 of SD1.5); bars take its figures as they are.
* Four regions: four image prompts with a mask each. 64 frames: an image for each. What a face prompt holds is mostly
  the LoRA of the FaceID file.
* --old-names: both packs run the node IPAdapterEmbeds, the projector included, so its time has no bar of its own.
* Ratios of times are medians over rounds of the ratio within a round. CPU time is judged: other programs disturb it
  less than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from overhead_host import load_ours, load_peer, start_comfyui
from overhead_table import Row, render


def main() -> int:
    """Measure, print, and return the exit code."""
    args = _arguments()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        version = start_comfyui(args.comfyui.resolve(), Path(scratch), args.device)
        with torch.inference_mode():  # as ComfyUI runs nodes
            rows = _measure(args)
    where = f"{args.threads} thread(s) of the CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"ComfyUI {version}, torch {torch.__version__}, {where}\n")
    print(render(rows))
    missed = [row.name for row in rows if row.met is False]
    print("\nMissed: " + "; ".join(missed) if missed else "\nEvery bar that could be judged is met.")
    if args.json:
        result = {
            "comfyui": version,
            "torch": torch.__version__,
            "device": where,
            "rows": [row.as_json() for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if missed else 0


def _measure(args: argparse.Namespace) -> list[Row]:
    from overhead_cases import Packs  # noqa: PLC0415 - this and what follows needs ComfyUI started

    packs = Packs(load_ours(), load_peer(args.peer.resolve()) if args.peer else None, args.old_names)
    if args.device == "cuda":
        from overhead_device import DeviceSettings, attention_alone, rows_on_device  # noqa: PLC0415

        settings = DeviceSettings(torch.device("cuda", 0), rounds=args.repeats, profile=args.profile)
        if args.profile:
            print(attention_alone(settings), flush=True)
        return list(_shown(rows_on_device(packs, settings)))
    from overhead_runs import Settings, rows_of_apply, rows_of_cases, rows_of_sampling  # noqa: PLC0415

    settings = Settings(args.width, args.size, args.steps, args.repeats, args.apply_repeats)
    rows: list[Row] = []
    for family in ("sd15", "sdxl"):
        rows += rows_of_sampling(packs, family, settings)
    return [*rows, *rows_of_cases(packs, settings), *rows_of_apply(packs, settings)]


def _shown(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, each also printed at once: a run may be stopped before the table."""
    for row in rows:
        print(" ".join(filter(None, row.cells())), file=sys.stderr, flush=True)
        yield row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What an image prompt costs in a real ComfyUI, beside the peer's.")
    where = os.environ.get("COMFYUI_PATH")
    parser.add_argument(
        "--comfyui",
        type=Path,
        default=where and Path(where),
        required=not where,
        help="a ComfyUI checkout; default: $COMFYUI_PATH",
    )
    parser.add_argument("--peer", type=Path, help="a ComfyUI_IPAdapter_plus checkout, to compare with")
    parser.add_argument(
        "--old-names",
        action="store_true",
        help="measure this pack's IPAdapterEmbeds, the peer's node under its own name, instead of Apply IP Adapter",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: steps of real size on a GPU, in 2 to 3 minutes with --repeats 4",
    )
    parser.add_argument("--profile", action="store_true", help="with cuda, also print the kernels that an adapter adds")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 makes CPU times comparable (default)")
    parser.add_argument("--width", type=int, default=64, help="channels of the sampled UNets' first level; 320 is real")
    parser.add_argument("--size", type=int, default=16, help="height and width of the sampled latents")
    parser.add_argument("--steps", type=int, default=4, help="steps of a timed run")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each contender")
    parser.add_argument("--apply-repeats", type=int, default=3, help="timed executions of each Apply")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no CUDA device; leave out --device to measure on the CPU.")
    if not (args.comfyui / "comfyui_version.py").is_file():
        parser.error(f"{args.comfyui} is no ComfyUI checkout (it has no comfyui_version.py).")
    if args.peer and not (args.peer / "__init__.py").is_file():
        parser.error(f"{args.peer} is no custom node pack (it has no __init__.py).")
    return args


if __name__ == "__main__":
    sys.exit(main())
