"""`ipadapter cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import options_of, quiet, user_errors


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("cache", context_settings={"ignore_unknown_options": True})(cache_command)


def cache_command(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [key=value ...]", help="The settings of the training, with cache=FOLDER."),
    ] = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Start although the forecast is more than the disk has room for.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Only compare every byte of a cache with the hashes in its manifest."),
    ] = None,
) -> None:
    """Run the frozen encoders once over the data and keep what they say; train then reads it.

    ipadapter cache sd15-base data=images cache=caches/cats

    The same command again goes on where it was stopped. Several GPUs or machines that see one folder share the work:
    accelerate launch --multi_gpu -m ipadapter_trainer.cli cache ...
    """
    kept = "Stopped; the shards that are written stay. Run the same command again to resume."
    with user_errors(stopped=kept, memory="Lower batch_size, or set mixed_precision=bf16."):
        from ..errors import ConfigError

        if check is not None:
            from ..cache.files import check_hashes
            from ..runtime.disk import show_bytes

            if arguments or force:
                raise ConfigError("Write `ipadapter cache --check FOLDER` alone.")
            manifest = check_hashes(check)
            count, size = len(manifest.shards), show_bytes(manifest.size)
            typer.echo(f"{check}: all {count} shards, {size}, are as they were written.")
            return
        from ..settings.config_file import config_of_arguments

        config = config_of_arguments("cache", arguments or [], options_of(context))
        from ..cache.write import write_cache

        quiet()
        write_cache(config, say=typer.echo, progress_bar=True, force=force)
