"""Commands for adapter files: export, convert, inspect, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import finite, user_errors

if TYPE_CHECKING:
    from ..files.convert import Written

DIFFERENT = 1

_Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; default: as in the input file.")]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT.")]


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Output folder of a training, a checkpoint, or an adapter file."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .bin file, or a folder for a default name.")
    ],
    *,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    force: _Force = False,
) -> None:
    """Export the newest weights of a training as a single file in the published layout, and verify it.

    ipadapter export runs/cats adapters/
    """
    with user_errors():
        from ..files.convert import convert
        from ..files.writing import dtype_of

        _report(convert(source, out, dtype=dtype_of(dtype), force=force))


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="An adapter file in any layout, or a folder written by Accelerate's save_state."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .bin file, or a folder for a default name.")
    ],
    *,
    dtype: _Dtype = None,
    version: Annotated[str | None, typer.Option(help="v1 or v2, for a faceid-plus file without this metadata.")] = None,
    force: _Force = False,
) -> None:
    """Convert an adapter to the published layout, as .safetensors or .bin, and verify it.

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


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file in any layout, or the output folder of a training.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an adapter file contains: kind, base model, image encoder, tokens, layers and provenance."""
    with user_errors():
        from json import dumps

        from ..files.describe import describe

        description = describe(file)
        typer.echo(dumps(description.as_json(), indent=2) if json else description.as_text())


def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="An adapter file in any layout, or the output folder of a training.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The adapter to compare it with.")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help="Largest difference that counts as equal, relative to the maximum of the tensor.",
        ),
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Compare two adapters. Exit status: 0 if equal, 1 if different, 2 if one cannot be read."""
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
