"""`ipadapter generate`, `ipadapter eval` and `ipadapter demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import INTERRUPTED, finite, quiet, user_errors
from .settings import ListOptions, Settings, read_settings


def generate(context: typer.Context, arguments: Settings = None, *, options: ListOptions = False) -> None:
    """Generate images from a text prompt, an image prompt or both.

    ipadapter generate base_model=models/stable-diffusion-v1-5 adapter=runs/cats image=cat.png
    prompt="a cat in space" output=space.png
    """
    with user_errors(memory="Lower num_images or size."):
        from ..settings.generate_config import GenerateConfig

        config = read_settings(context, GenerateConfig, arguments, options)
        from ..evaluation.generate_images import generate_files

        quiet()
        for file in generate_files(config):
            typer.echo(f"Saved {file}")


def evaluate(context: typer.Context, arguments: Settings = None, *, options: ListOptions = False) -> None:
    """Score an adapter with CLIP-I and CLIP-T, by the protocol of the paper.

    ipadapter eval base_model=models/stable-diffusion-v1-5 adapter=runs/cats data=cats
    clip=models/clip-vit-large-patch14 weights=0,0.5,1

    Rerun the same command to resume. Several GPUs share the work:
    accelerate launch --multi_gpu -m ipadapter_trainer.cli eval ...
    """
    with user_errors(memory="Lower batch_size or size."):
        from ..settings.eval_config import EvalConfig

        config = read_settings(context, EvalConfig, arguments, options)
        from json import dumps

        from ..evaluation.evaluate import evaluate
        from ..runtime.disk import whole_file
        from ..runtime.processes import connect

        quiet()
        is_main = connect(cuda_or_cpu=True).is_main_process
        try:
            evaluation = evaluate(config, say=typer.echo, progress_bar=True)
        except KeyboardInterrupt:
            if is_main:
                typer.echo("Stopped; the scores so far are kept. Run the same command again to resume.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if not is_main:
            return
        typer.echo(evaluation.as_text())
        if config.result is not None:
            with whole_file(config.result) as temporary:
                temporary.write_text(dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
            typer.echo(f"Saved {config.result}")


def demo(
    output: Annotated[
        Path,
        typer.Option(help="Image to write; the adapter is saved beside it, as .safetensors. Both replace older ones."),
    ] = Path("demo.png"),
    adapter: Annotated[str | None, typer.Option(help='Skip the training: "bundled", or an adapter file.')] = None,
    minutes: Annotated[float, typer.Option(min=0.1, callback=finite, help="Training time.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed.")] = 0,
) -> None:
    """Train an adapter on the bundled emoji model and show its results. Needs no download and no GPU."""
    with user_errors(memory="Close other programs, and try again."):
        from ..demo.run import demo

        quiet()
        demo(output, adapter, minutes, seed)
