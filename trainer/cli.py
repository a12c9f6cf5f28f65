"""The command `ipadapter`. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="ipadapter",
    help="Train IP-Adapters, try them, and look into their files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USER_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """The console entry point."""
    app()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"ip-adapter-kit {version('ip-adapter-kit')}")
    except PackageNotFoundError:  # run from a checkout
        typer.echo("ip-adapter-kit (not installed)")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        # Eager: it answers before the missing command is noticed.
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command("train")
def train_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.toml] [key=value ...]", help="A settings file and changes to it."),
    ] = None,
    options: Annotated[bool, typer.Option("--options", help="List every key, its default and its meaning.")] = False,
) -> None:
    """Train an adapter; the same command again resumes it.

    ipadapter train configs/sd15-base.toml data=pictures output=runs/cats
    """
    with user_errors():
        from .config import load_config, options_text
        from .errors import ConfigError

        if options:
            typer.echo(options_text())
            return
        given = arguments or []
        files = [a for a in given if "=" not in a]
        if not given or len(files) > 1 or (files and given[0] != files[0]):
            raise ConfigError(
                "Write `ipadapter train [CONFIG.toml] [key=value ...]`: at most one file, and it comes first. "
                "`ipadapter train --options` lists the keys."
            )
        config = load_config(Path(files[0]) if files else None, [a for a in given if "=" in a])
        from .train import Interrupted, train

        _quiet()

        try:
            exported = train(config, say=typer.echo, progress_bar=True)
        except Interrupted as stop:
            typer.echo(f"Stopped; saved {stop.checkpoint}. Run the same command again to resume.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        typer.echo(f"Saved {exported}")


@app.command("generate")
def generate_command(
    *,
    base_model: Annotated[Path, typer.Option(help="Folder of the base model in the diffusers layout.")],
    output: Annotated[Path, typer.Option(help="Picture to write; with --count, -1, -2, ... are added.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter file; without it the base model alone.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture that is the prompt.")] = None,
    prompt: Annotated[str, typer.Option(help="What the picture shall show, in words.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="What it shall not show.")] = "",
    weight: Annotated[float, typer.Option(help="Strength of the image prompt; 0 ignores it.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Strength of guidance; 1 turns it off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures to make.")] = 1,
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; default: the model's own.")] = None,
    image_encoder: Annotated[
        Path | None,
        typer.Option(help="Folder of the image encoder; default: image_encoder inside the base model."),
    ] = None,
) -> None:
    """Generate pictures with an image prompt, a text prompt or both."""
    with user_errors():
        from .pictures import generate_files

        _quiet()

        paths = generate_files(
            base_model,
            adapter,
            image,
            output,
            prompt=prompt,
            negative_prompt=negative_prompt,
            weight=weight,
            steps=steps,
            guidance=guidance,
            seed=seed,
            count=count,
            size=size,
            image_encoder=image_encoder,
        )
        for path in paths:
            typer.echo(f"Saved {path}")


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="An adapter file of any published layout.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an adapter file is: kind, base, encoder, tokens, layers, and where it comes from."""
    with user_errors():
        from json import dumps

        from .describe import describe

        description = describe(file)
        typer.echo(dumps(description.as_json(), indent=2) if json else description.as_text())


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("demo.png"),
    adapter: Annotated[str | None, typer.Option(help='Skip the training: "bundled", or an adapter file.')] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to train.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Another seed gives other pictures.")] = 0,
) -> None:
    """Train an adapter on the bundled emoji model and show it at work: no download, no GPU."""
    with user_errors():
        from .demo import demo

        _quiet()

        demo(output, adapter, minutes, seed)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except ValueError as error:
        from ipadapter_core import AdapterError

        from .errors import TrainerError

        if not isinstance(error, (AdapterError, TrainerError)):
            raise
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed. Install the trainer with: pip install 'ip-adapter-kit[train]'")


def _quiet() -> None:
    """No progress bars for the loading of parts: there are many, and each is short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _fail(message: str) -> None:
    typer.echo(f"ipadapter: {' '.join(message.split())}", err=True)
    raise typer.Exit(USER_ERROR) from None


if __name__ == "__main__":
    main()
