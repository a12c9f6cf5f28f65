"""`ipadapter report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import user_errors


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Output folder of a training, finished or running."),
    ] = None,
) -> None:
    """Write an HTML report of a training: curves, samples and what the numbers mean.

    ipadapter report runs/cats
    """
    with user_errors():
        from ipadapter_core import AdapterError

        from ..errors import ConfigError, ExportError
        from ..files.describe import describe
        from ..report.page import write_report

        if not runs or len(runs) > 1:
            given = f"{len(runs)} are given" if runs else "none is given"
            raise ConfigError(
                f"`ipadapter report` takes one run, the output folder of a training; {given}. Several runs are "
                "compared with `tensorboard --logdir` and their parent folder."
            )
        (run,) = runs
        try:
            adapter = describe(run).as_text()
        except (ExportError, AdapterError) as error:  # no checkpoint yet, or a damaged one
            adapter = "" if isinstance(error, ExportError) else str(error)
        typer.echo(f"Saved {write_report(run, adapter)}")
