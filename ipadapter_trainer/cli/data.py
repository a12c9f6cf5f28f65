"""`ipadapter data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import user_errors


def check(
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
        typer.Option(
            help="Contact sheet to write: samples with their captions.", show_default="sheet.png, outside the data"
        ),
    ] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="Write no contact sheet.")] = False,
    min_side: Annotated[int, typer.Option(min=1, help="Report images with a shorter side, in pixels.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with all file names.")] = False,
) -> None:
    """Read a data set and report its size, broken, tiny and duplicate images, with a contact sheet.

    ipadapter data check images

    Decodes every image. Exit status 2 if no image can be used.
    """
    with user_errors():
        from json import dumps

        from ..data.check import check_data, is_inside
        from ..errors import ConfigError, DataError
        from ..settings.fields import LIST_SUFFIXES

        if not path:  # an unset shell variable
            raise ConfigError("data is missing. Name a folder, a list or shards: `ipadapter data check images`.")
        if root is not None and Path(path).suffix.lower() not in LIST_SUFFIXES:
            raise ConfigError(f"--root is for .json, .jsonl and .csv lists, but data is {path!r}. Leave it out.")
        if sheet is not None and no_sheet:
            raise ConfigError(f"--sheet {sheet} and --no-sheet exclude each other. Leave one out.")
        target = sheet or Path("sheet.png")
        refused = sheet is None and not no_sheet and is_inside(target, path)
        report = check_data(
            path, root, min_side=min_side, sheet=None if no_sheet or refused else target, progress_bar=True
        )
        typer.echo(dumps(report.as_json(), indent=2, ensure_ascii=False) if json else report.as_text())
        if refused:
            typer.echo(
                "No contact sheet: this is the data set's folder. Write it elsewhere with --sheet ../sheet.png.",
                err=True,
            )
        if not report.usable:
            raise DataError(f"{path}: none of the {report.images} images can be used.")
        if report.unreadable:
            raise DataError(
                f"{path}: {len(report.unreadable)} captions or rows are unreadable; a training refuses them."
            )
