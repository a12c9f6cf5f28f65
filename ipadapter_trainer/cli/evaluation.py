"""`ipadapter eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import INTERRUPTED, finite, quiet, user_errors


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval")(eval_command)


def eval_command(
    *,
    base_model: Annotated[
        Path, typer.Option(help="Base model: a diffusers folder, a Hub id, or a .safetensors checkpoint.")
    ],
    adapter: Annotated[Path, typer.Option(help="Adapter file, or a training's output folder.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Image prompts and captions: a folder, a .json or .jsonl list, or COCO's captions_val2017.json."
        ),
    ],
    clip: Annotated[
        Path | None,
        typer.Option(help="The CLIP that measures, a folder or Hub id; the paper's is openai/clip-vit-large-patch14."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for scores and images; the same command goes on there.")] = Path(
        "evaluation"
    ),
    images_per_caption: Annotated[int, typer.Option(min=1, help="Images to generate for each image prompt.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Image prompts at most, drawn with the seed.")] = 5000,
    weights: Annotated[
        str, typer.Option("--weights", "--weight", help="Strength of the image prompt; several: 0,0.5,1.")
    ] = "1",
    controls: Annotated[
        bool, typer.Option("--controls", help="Weight 0 as well: what the base model scores without an image.")
    ] = False,
    text: Annotated[
        str, typer.Option(help="none: the image alone, as in the paper. caption: the image and its caption.")
    ] = "none",
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 50,
    guidance: Annotated[float, typer.Option(callback=finite, help="Strength of guidance; 1 turns it off.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Another seed draws other prompts and noise.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Side, or WIDTHxHEIGHT, in pixels; default: the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once; it changes no result.")] = 8,
    images: Annotated[int, typer.Option(min=0, help="Prompts whose images are kept and drawn in a grid.")] = 6,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
    caption_prefix: Annotated[
        str, typer.Option(help='Before each caption in CLIP-T; CLIPScore\'s authors have "A photo depicts ".')
    ] = "",
    root: Annotated[
        Path | None, typer.Option(help="Folder of the images that a list names; default: the list's folder.")
    ] = None,
    face_embeds: Annotated[
        Path | None, typer.Option(help="For the faceid kinds: a .safetensors or .npz table of face embeddings.")
    ] = None,
    image_encoder: Annotated[
        Path | None,
        typer.Option(
            help="The adapter's image encoder: folder, Hub id or .safetensors; default: inside the base model."
        ),
    ] = None,
    base_config: Annotated[
        Path | None,
        typer.Option(help="For a .safetensors base model: a diffusers folder with its configs and tokenizers."),
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, for a .safetensors base model that does not say.")
    ] = None,
    shortcut: Annotated[
        bool | None, typer.Option(help="FaceID-plus v2, or v1, for an adapter file that does not say.")
    ] = None,
) -> None:
    """Measure an adapter as the paper does: CLIP-I and CLIP-T, beside the paper's table.

    ipadapter eval --base-model models/stable-diffusion-v1-5 --image-encoder models/IP-Adapter/models/image_encoder
    --adapter runs/cats --data cats --clip models/clip-vit-large-patch14 --controls

    Ctrl-C stops it; the same command goes on. Several GPUs share the work:
    accelerate launch --multi_gpu -m ipadapter_trainer.cli eval ...
    """
    with user_errors(memory="Lower --batch-size or --size."):
        from ..evaluation.settings import EvalSettings, parse_weights

        settings = EvalSettings(
            base_model=base_model,
            adapter=adapter,
            data=data,
            clip=clip,
            output=output,
            images_per_caption=images_per_caption,
            limit=limit,
            weights=parse_weights(weights),
            controls=controls,
            text=text,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=size,
            batch_size=batch_size,
            images=images,
            caption_prefix=caption_prefix,
            root=root,
            face_embeds=face_embeds,
            image_encoder=image_encoder,
            base_config=base_config,
            prediction_type=prediction_type,
            shortcut=shortcut,
        )
        from json import dumps

        from ..evaluation.evaluate import evaluate, processes
        from ..runtime.disk import whole_file

        quiet()
        is_main = processes().is_main_process
        try:
            evaluation = evaluate(settings, say=typer.echo, progress_bar=True)
        except KeyboardInterrupt:
            if is_main:
                typer.echo("Stopped; what is measured is kept. Run the same command again to go on.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if not is_main:
            return
        typer.echo(evaluation.as_text())
        if json is not None:
            with whole_file(json) as temporary:
                temporary.write_text(dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
            typer.echo(f"Saved {json}")
