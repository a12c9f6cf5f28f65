"""Train the next emoji model, part by part, from the images alone; every part resumes where it was.

    paths="--images pictures.zip --work work/emoji --output work/emoji/model"
    python -m tools.emoji.train vae clip concepts $paths --minutes 20
    python -m tools.emoji.train styles unet export $paths --minutes 60
    python -m tools.emoji.train plus base decoder export $paths --minutes 15
    python -m tools.emoji.quality --folder work/emoji/model --images pictures.zip --output quality.json

The images decide the size of the model: 128 px, or 64 px from ``tools.emoji.build --size 64``.

The package still brings the model that `tools/shipped_emoji` trained; this one takes its place when its figures are
better. `benchmarks/training/emoji.py` runs all of it on one GPU.

A GPU is used when there is one; ``--batch-size 1024 --views 16`` gives it more to do in unet, plus and base.
Running a part again with more steps or minutes continues it; ``unpack`` makes checkpoints from the shipped weights,
for whoever has no others. A part that is trained further makes those after it stale:
the UNet learns the latents of one autoencoder and the states of one text encoder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ipadapter_core.assets import MODEL, PROMPTS

from .images import EmojiImages, load_images, save_prompts

ADAPTERS = {"plus": "adapter.safetensors", "base": "adapter_base.safetensors"}


@dataclass(frozen=True)
class Run:
    """What the command line asked for; ``train`` are the images of the file ``images`` to train on."""

    images: Path
    train: EmojiImages
    work: Path
    output: Path
    steps: int
    minutes: float
    batch_size: int | None = None
    views: int | None = None

    def sized(self, batch_size: int, learning_rate: float) -> dict[str, Any]:
        """The batch size that was asked for, or a part's own, and the learning rate for it.

        It grows with the square root of the batch, as AdamW's should (arXiv 2205.10287), but not beyond three times.
        """
        wanted = self.batch_size or batch_size
        return {"batch_size": wanted, "learning_rate": learning_rate * min(3.0, math.sqrt(wanted / batch_size))}

    def limits(self, part: str) -> dict[str, Any]:
        """The arguments of ``fit`` that every part shares."""
        return {"checkpoint": self.work / f"{part}.pt", "steps": self.steps, "minutes": self.minutes}


def train_vae(run: Run) -> None:
    from ..shipped_emoji.loop import training_device
    from .loop import fit
    from .vae import BATCH, new_vae, vae_losses

    sized = run.sized(BATCH, 1e-3)
    losses = vae_losses(run.train, sized["batch_size"], training_device())
    fit(new_vae(run.train.size), losses, **run.limits("vae"), **sized)


def train_decoder(run: Run) -> None:
    """Go on with the autoencoder's decoder alone; the latents, which the UNet knows, stay."""
    from ..shipped_emoji.loop import training_device
    from ..shipped_emoji.vae import only_decoder
    from .loop import fit
    from .stack import load_vae
    from .vae import BATCH, decoder_losses

    sized = run.sized(BATCH, 5e-4)
    vae = load_vae(run.work, run.train, with_decoder=False)
    losses = decoder_losses(run.train, vae, sized["batch_size"], training_device())
    fit(only_decoder(vae), losses, **run.limits("decoder"), **sized)


def train_clip(run: Run) -> None:
    from ipadapter_trainer.demo.emoji import styled_caption

    from ..shipped_emoji.clip import train_tokenizer
    from .clip import clip_losses, new_clip
    from .loop import fit

    texts = [styled_caption(c, s) for c, s in zip(run.train.captions, run.train.styles, strict=True)]
    tokenizer = train_tokenizer([*texts, "recoloured"], run.work / "tokenizer")
    concepts = run.batch_size or 32
    losses = clip_losses(run.train, tokenizer, concepts, pairs=2 * concepts)
    # A contrast of unit vectors needs more than bfloat16's eight bits.
    clip = new_clip(tokenizer, run.train.size)
    fit(clip, losses, **run.limits("clip"), learning_rate=1e-3, weight_decay=0.05, bfloat16=False)


def train_vision(run: Run) -> None:
    """Go on with CLIP's vision tower alone; the text tower, which the UNet knows, stays (LiT, arXiv 2111.07991)."""
    from ..shipped_emoji.stack import only_vision
    from .clip import clip_losses
    from .loop import fit
    from .stack import load_clip

    clip, tokenizer = load_clip(run.work, run.train.size, with_vision=False)
    losses = clip_losses(run.train, tokenizer)
    fit(only_vision(clip), losses, **run.limits("vision"), learning_rate=1e-3, weight_decay=0.05, bfloat16=False)


def train_styles(run: Run) -> None:
    from .judges import new_style_classifier, style_losses
    from .loop import fit
    from .stack import load_vae

    losses = style_losses(run.train, load_vae(run.work, run.train))
    fit(new_style_classifier(), losses, **run.limits("styles"), learning_rate=1e-3, weight_decay=0.05)


def train_concepts(run: Run) -> None:
    from .judges import ConceptClassifier, concept_losses
    from .loop import fit

    losses = concept_losses(run.train, run.batch_size or 128)
    fit(ConceptClassifier(), losses, **run.limits("concepts"), learning_rate=1e-3, weight_decay=0.05)


def train_unet(run: Run) -> None:
    from ..shipped_emoji.loop import on_training_device
    from .loop import fit
    from .stack import load_clip, load_vae
    from .unet import BATCH, VIEWS, new_unet, unet_losses

    sized = run.sized(BATCH, 5e-4)
    clip, tokenizer = load_clip(run.work, run.train.size)
    vae, text_encoder = load_vae(run.work, run.train), on_training_device(clip.text_model)
    losses = unet_losses(run.train, vae, text_encoder, tokenizer, sized["batch_size"], run.views or VIEWS)
    fit(new_unet(run.train.size), losses, **run.limits("unet"), **sized)


def train_adapter(run: Run, kind: str) -> None:
    """A bundled adapter, over the exported model, by the same loss as ``ipadapter train``."""
    from ipadapter_trainer.files.provenance import export_adapter, provenance
    from ipadapter_trainer.models.base_model import load_base_model

    from ..shipped_emoji.loop import training_device
    from .adapter import BATCH, LEARNING_RATE, VIEWS, fit_adapter
    from .loop import progress

    device = training_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base_model = load_base_model(run.output / MODEL, device=device, dtype=dtype)
    sized, views = run.sized(BATCH, LEARNING_RATE), run.views or VIEWS
    adapter = fit_adapter(base_model, run.train, kind, **run.limits(kind), **sized, views=views)
    done = progress(run.work / f"{kind}.pt")
    metadata = provenance(base_model, adapter.spec, steps=done.step, images_seen=done.images, seed=0)
    export_adapter(run.output / ADAPTERS[kind], adapter, metadata)


def export_stack(run: Run) -> None:
    from .stack import export

    export(run.work, run.train, run.output)
    save_prompts(run.images, run.output / PROMPTS)


def unpack_stack(run: Run) -> None:
    from ipadapter_core import load_adapter

    from .loop import start_from
    from .stack import unpack

    unpack(run.output, run.work)
    for kind, name in ADAPTERS.items():
        if (run.output / name).is_file():
            adapter = load_adapter(run.output / name, dtype=torch.float32).requires_grad_(True)
            start_from(adapter, run.work / f"{kind}.pt")


PARTS: dict[str, Callable[[Run], None]] = {
    "unpack": unpack_stack,
    "vae": train_vae,
    "decoder": train_decoder,
    "clip": train_clip,
    "vision": train_vision,
    "styles": train_styles,
    "concepts": train_concepts,
    "unet": train_unet,
    "export": export_stack,
    "plus": partial(train_adapter, kind="plus"),
    "base": partial(train_adapter, kind="base"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--images", type=Path, required=True, help="pictures.zip of tools.emoji.build")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and its adapters")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of a part in all, earlier runs counted in")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop a part after this long")
    parser.add_argument("--batch-size", type=int, help="images a step (clip: concepts, in every style)")
    parser.add_argument("--views", type=int, help="encoded views of each image for unet, plus and base (default: 4)")
    arguments = parser.parse_args()
    for name in ("batch_size", "views"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 1; leave it out for the default.")
    torch.set_float32_matmul_precision("high")  # small models in float32, for which TF32 is precise enough
    run = Run(
        images=arguments.images,
        train=load_images(arguments.images, "train"),
        work=arguments.work,
        output=arguments.output,
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch_size=arguments.batch_size,
        views=arguments.views,
    )
    for part in arguments.parts:
        PARTS[part](run)


if __name__ == "__main__":
    main()
