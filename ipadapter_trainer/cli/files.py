"""The commands about adapter files: export, convert, inspect, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import finite, user_errors

if TYPE_CHECKING:
    from ..files.convert import Written

DIFFERENT = 1

_Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; default: as in the file.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace OUT when it exists.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export")(export_command)
    app.command("convert")(convert_command)
    app.command("inspect")(inspect_command)
    app.command("diff")(diff_command)


def export_command(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Output folder of a training, one of its checkpoints, or an adapter file."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .bin file, or a folder: the name is made.")
    ],
    *,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    force: _Force = False,
) -> None:
    """Write a training's newest weights as one file that every host loads, and check it.

    ipadapter export runs/cats adapters/
    """
    with user_errors():
        from ..files.convert import convert
        from ..files.writing import dtype_of

        _report(convert(source, out, dtype=dtype_of(dtype), force=force))


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="An adapter file of any layout, or a folder that Accelerate's save_state wrote."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .bin file, or a folder: the name is made.")
    ],
    *,
    dtype: _Dtype = None,
    version: Annotated[str | None, typer.Option(help="v1 or v2, for a faceid-plus file that does not say.")] = None,
    force: _Force = False,
) -> None:
    """Bring an adapter into the published layout, as .safetensors or .bin, and check it.

    ipadapter convert sd-ip_adapter/checkpoint-20000 ip-adapter_sd15.safetensors
    """
    with user_errors():
        from ..errors import ExportError
        from ..files.convert import convert
        from ..files.writing import dtype_of

        if version not in (None, "v1", "v2"):
            raise ExportError(f"--version {version}: expected v1 or v2.")
        shortcut = None if version is None else version == "v2"
        _report(convert(source, out, dtype=dtype_of(dtype), shortcut=shortcut, force=force))


def inspect_command(
    file: Annotated[Path, typer.Argument(help="An adapter file of any layout, or a training's folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an adapter file is: kind, base, encoder, tokens, layers, and where it comes from."""
    with user_errors():
        from json import dumps

        from ..files.describe import describe

        description = describe(file)
        typer.echo(dumps(description.as_json(), indent=2) if json else description.as_text())


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter file of any layout, or a training's folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="Largest difference that counts as equal, as a share of a tensor's maximum."
        ),
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Compare two adapters: exit status 0 when equal, 1 when different, 2 when one cannot be read."""
    with user_errors():
        from json import dumps

        from ..files.diff import diff

        difference = diff(first, second)
        typer.echo(dumps(difference.as_json(tolerance), indent=2) if json else difference.as_text(tolerance))
        equal = difference.equal(tolerance)
    if not equal:
        raise typer.Exit(DIFFERENT)


def _report(written: Written) -> None:
    for warning in written.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    typer.echo(written.verification.as_text())
    typer.echo(f"Saved {written.file}")
