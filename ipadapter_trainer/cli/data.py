"""`ipadapter data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import user_errors


def register(app: typer.Typer) -> None:
    """Add the commands about data sets."""
    data = typer.Typer(help="Look at a data set before a training does.", no_args_is_help=True)
    data.command("check")(check_command)
    app.add_typer(data, name="data")


def check_command(
    path: Annotated[
        str,
        typer.Argument(help="A folder, a .json, .jsonl or .csv list, or shards such as 'images-*.tar'."),
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that file names in a list are relative to; default: the list's folder."),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Image to write: samples with their captions.", show_default="sheet.png, outside the data"),
    ] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="Write no samples.")] = False,
    min_side: Annotated[int, typer.Option(min=1, help="Name images with a shorter side, in pixels.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with every name.")] = False,
) -> None:
    """Count, sample, and find the broken, the tiny and the duplicate images.

    ipadapter data check images

    Every image is read and decoded entirely. Exit status 2 when not a single one can be used.
    """
    with user_errors():
        from json import dumps

        from ..data.check import check_data, is_inside
        from ..errors import DataError

        target = sheet or Path("sheet.png")
        refused = sheet is None and not no_sheet and is_inside(target, path)
        report = check_data(
            path, root, min_side=min_side, sheet=None if no_sheet or refused else target, progress_bar=True
        )
        typer.echo(dumps(report.as_json(), indent=2, ensure_ascii=False) if json else report.as_text())
        if refused:
            typer.echo(
                "No samples were written, as this is the data set's folder; --sheet ../sheet.png does.", err=True
            )
        if not report.usable:
            raise DataError(f"{path}: none of the {report.images} images can be used.")
        if report.unreadable:
            raise DataError(
                f"{path}: {len(report.unreadable)} captions or rows are unreadable; a training refuses them."
            )
