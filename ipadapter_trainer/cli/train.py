"""`ipadapter train` and `ipadapter cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import INTERRUPTED, quiet, user_errors
from .settings import ListOptions, TrainSettings, read_settings


def train(
    context: typer.Context,
    arguments: TrainSettings = None,
    *,
    options: ListOptions = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate memory and compute, and stop.")
    ] = False,
) -> None:
    """Train an adapter. Rerun the same command to resume.

    ipadapter train sd15-base data=images output=runs/cats
    """
    with user_errors():
        from ..settings.config import TrainConfig

        config = read_settings(context, TrainConfig, arguments, options)
        quiet()
        if dry_run:
            from ..training.dry_run import dry_run as report_dry_run

            report_dry_run(config, typer.echo)
            return
        from ..training.train import Interrupted
        from ..training.train import train as run_training

        try:
            run_training(config, say=typer.echo, progress_bar=True)
        except Interrupted as stop:
            typer.echo(str(stop), err=True)
            raise typer.Exit(INTERRUPTED) from None


def cache(
    context: typer.Context,
    arguments: TrainSettings = None,
    *,
    options: ListOptions = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the disk seems too small.")] = False,
) -> None:
    """Run the frozen encoders once over the data set and save their outputs. Training then reads them.

    ipadapter cache sd15-base data=images cache=caches/cats

    Rerun the same command to resume. Several GPUs or machines with a shared folder split the work:
    accelerate launch --multi_gpu -m ipadapter_trainer.cli cache ...
    """
    stopped = "Stopped; the shards that are written stay. Run the same command again to resume."
    with user_errors(stopped=stopped, memory="Lower batch_size, or set mixed_precision=bf16."):
        from ..settings.config import TrainConfig

        config = read_settings(context, TrainConfig, arguments, options)
        from ..cache.write import write_cache

        quiet()
        write_cache(config, say=typer.echo, progress_bar=True, force=force)
