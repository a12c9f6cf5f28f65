"""The command `ipadapter`. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cache import register as register_cache
from .data import register as register_data
from .errors import INTERRUPTED, Commands, catch_interrupts, finite, options_of, quiet, user_errors
from .evaluation import register as register_eval
from .files import register as register_files
from .models import register as register_models
from .report import register as register_report

app = typer.Typer(
    name="ipadapter",
    cls=Commands,
    help="Train IP-Adapters, try them, and look into their files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry point."""
    catch_interrupts()
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


@app.command("train", context_settings={"ignore_unknown_options": True})  # they are answered with key=value
def train_command(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [key=value ...]", help="A config (`ipadapter new` lists them) and changes to it."
        ),
    ] = None,
    options: Annotated[
        bool, typer.Option("--options", help="List every key with its default, values and meaning.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what it needs in memory and work, and stop.")
    ] = False,
) -> None:
    """Train an adapter; the same command again resumes it.

    ipadapter train sd15-base data=images output=runs/cats
    """
    with user_errors():
        from ..settings.config_file import config_of_arguments, options_text

        if options:
            typer.echo(options_text())
            return
        config = config_of_arguments("train", arguments or [], options_of(context))
        quiet()
        if dry_run:
            from ..training.dry_run import dry_run

            dry_run(config, typer.echo)
            return
        from ..training.train import Interrupted, train

        try:
            train(config, say=typer.echo, progress_bar=True)
        except Interrupted as stop:
            typer.echo(str(stop), err=True)
            raise typer.Exit(INTERRUPTED) from None


@app.command("generate")
def generate_command(
    *,
    base_model: Annotated[
        Path, typer.Option(help="Base model: a diffusers folder, a Hub id, or a .safetensors checkpoint.")
    ],
    output: Annotated[Path, typer.Option(help="Image to write; with --count, -1, -2, ... are added.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter file; without it the base model alone.")] = None,
    image: Annotated[Path | None, typer.Option(help="The image that is the prompt.")] = None,
    face_embed: Annotated[
        Path | None,
        typer.Option(help="For the faceid kinds: a .npy or .safetensors file with one face embedding."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the image shall show, in words.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="What it shall not show.")] = "",
    weight: Annotated[float, typer.Option(callback=finite, help="Strength of the image prompt; 0 ignores it.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 20,
    guidance: Annotated[float, typer.Option(callback=finite, help="Strength of guidance; 1 turns it off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the first image; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images to make.")] = 1,
    size: Annotated[
        str | None, typer.Option(help="Side, or WIDTHxHEIGHT, in pixels; default: the model's own.")
    ] = None,
    image_encoder: Annotated[
        Path | None,
        typer.Option(help="Image encoder: folder, Hub id or .safetensors; default: the one inside the base model."),
    ] = None,
    base_config: Annotated[
        Path | None,
        typer.Option(help="For a .safetensors base model: a diffusers folder with its configs and tokenizers."),
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, for a .safetensors base model that does not say.")
    ] = None,
    shortcut: Annotated[
        bool | None,
        typer.Option(help="FaceID-plus v2, or v1, for an adapter file that does not say."),
    ] = None,
) -> None:
    """Generate images with an image prompt, a text prompt or both."""
    with user_errors(memory="Lower --count or --size."):
        from ..evaluation.generate_images import generate_files

        quiet()

        paths = generate_files(
            base_model,
            adapter,
            image,
            output,
            face_embed=face_embed,
            prompt=prompt,
            negative_prompt=negative_prompt,
            weight=weight,
            steps=steps,
            guidance=guidance,
            seed=seed,
            count=count,
            size=size,
            image_encoder=image_encoder,
            base_config=base_config,
            prediction_type=prediction_type,
            shortcut=shortcut,
        )
        for path in paths:
            typer.echo(f"Saved {path}")


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Image to write.")] = Path("demo.png"),
    adapter: Annotated[str | None, typer.Option(help='Skip the training: "bundled", or an adapter file.')] = None,
    minutes: Annotated[float, typer.Option(min=0.1, callback=finite, help="How long to train.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Another seed gives other images.")] = 0,
) -> None:
    """Train an adapter on the bundled emoji model and show it at work: no download, no GPU."""
    with user_errors(memory="Close other programs, and try again."):
        from ..demo.run import demo

        quiet()

        demo(output, adapter, minutes, seed)


register_files(app)
register_cache(app)
register_data(app)
register_eval(app)
register_report(app)
register_models(app)

if __name__ == "__main__":
    main()
