"""`ipadapter report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import user_errors


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("report")(report_command)


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training, which may still go on.")],
) -> None:
    """Write the report of a training: its curves, its samples, and what the numbers mean.

    ipadapter report runs/cats
    """
    with user_errors():
        from ..errors import ExportError
        from ..files.describe import describe
        from ..monitor.report import write_report

        try:
            adapter = describe(run).as_text()
        except ExportError:  # no checkpoint yet
            adapter = ""
        typer.echo(f"Saved {write_report(run, adapter)}")
