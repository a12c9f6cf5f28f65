"""Train the emoji stack, part by part, from the images alone; every part resumes where it was.

    python -m tools.shipped_emoji.train vae clip --work work/emoji --minutes 20
    python -m tools.shipped_emoji.train judge unet --work work/emoji --minutes 60
    python -m tools.shipped_emoji.train export --work work/emoji --output assets/emoji
    python -m tools.shipped_emoji.train adapter --work work/emoji --output assets/emoji --minutes 15

A GPU is used when there is one; ``--batch-size 512`` gives it more to do in unet and adapter.
Running a part again with more steps or minutes continues it; ``unpack`` makes checkpoints from the shipped weights,
for whoever has no others. A part that is trained further makes those after it stale:
the UNet learns the latents of one autoencoder and the states of one text encoder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipadapter_core.assets import MODEL, PROMPTS, emoji_folder
from ipadapter_trainer.demo.emoji import EmojiImages, load_images

from .build import save_prompts

JUDGE_STEPS = 1000  # after these it only learns the training images better


@dataclass(frozen=True)
class Run:
    """What the command line asked for; ``train`` are the images of the file ``images`` to train on."""

    images: Path
    train: EmojiImages
    work: Path
    output: Path
    steps: int
    minutes: float
    batch_size: int | None

    def sized(self, batch_size: int, learning_rate: float) -> dict[str, Any]:
        """The batch size that was asked for, or a part's own, and the learning rate for it.

        It grows with the square root of the batch, as AdamW's should (arXiv 2205.10287).
        """
        wanted = self.batch_size or batch_size
        return {"batch_size": wanted, "learning_rate": learning_rate * math.sqrt(wanted / batch_size)}


def train_vae(run: Run) -> None:
    from .loop import fit
    from .vae import BATCH, new_vae, vae_losses

    sized = run.sized(BATCH, 1e-3)
    losses = vae_losses(run.train, sized["batch_size"])
    fit(new_vae(), losses, checkpoint=run.work / "vae.pt", steps=run.steps, minutes=run.minutes, **sized)


def train_decoder(run: Run) -> None:
    """Go on with the autoencoder's decoder alone; the latents, which the UNet knows, stay."""
    from .loop import fit, on_training_device
    from .stack import load_vae
    from .vae import BATCH, decoder_losses, only_decoder

    sized = run.sized(BATCH, 5e-4)
    vae = on_training_device(load_vae(run.work, run.train, with_decoder=False))
    losses = decoder_losses(run.train, vae, sized["batch_size"])
    fit(only_decoder(vae), losses, checkpoint=run.work / "decoder.pt", steps=run.steps, minutes=run.minutes, **sized)


def train_clip(run: Run) -> None:
    from ipadapter_trainer.demo.emoji import styled_caption

    from .clip import clip_losses, new_clip, train_tokenizer
    from .loop import fit

    texts = [styled_caption(c, s) for c, s in zip(run.train.captions, run.train.styles, strict=True)]
    tokenizer = train_tokenizer(texts, run.work / "tokenizer")
    fit(
        new_clip(tokenizer),
        clip_losses(run.train, tokenizer),
        checkpoint=run.work / "clip.pt",
        steps=run.steps,
        minutes=run.minutes,
        learning_rate=1e-3,
        weight_decay=0.05,
    )


def train_vision(run: Run) -> None:
    """Go on with CLIP's vision tower alone; the text tower, which the UNet knows, stays (LiT, arXiv 2111.07991)."""
    from .clip import clip_losses
    from .loop import fit
    from .stack import load_clip, only_vision

    clip, tokenizer = load_clip(run.work, with_vision=False)
    fit(
        only_vision(clip),
        clip_losses(run.train, tokenizer),
        checkpoint=run.work / "vision.pt",
        steps=run.steps,
        minutes=run.minutes,
        learning_rate=1e-3,
        weight_decay=0.05,
    )


def train_judge(run: Run) -> None:
    from ipadapter_trainer.demo.judges import StyleClassifier

    from .judges import classifier_losses
    from .loop import fit, on_training_device
    from .stack import load_vae

    fit(
        StyleClassifier(),
        classifier_losses(run.train, on_training_device(load_vae(run.work, run.train))),
        checkpoint=run.work / "judge.pt",
        steps=min(run.steps, JUDGE_STEPS),
        minutes=run.minutes,
        learning_rate=1e-3,
        weight_decay=0.05,
    )


def train_unet(run: Run) -> None:
    from .loop import fit, on_training_device
    from .stack import load_clip, load_vae
    from .unet import BATCH, new_unet, unet_losses

    sized = run.sized(BATCH, 5e-4)
    clip, tokenizer = load_clip(run.work)
    vae, text_encoder = on_training_device(load_vae(run.work, run.train)), on_training_device(clip.text_model)
    losses = unet_losses(run.train, vae, text_encoder, tokenizer, sized["batch_size"])
    fit(new_unet(), losses, checkpoint=run.work / "unet.pt", steps=run.steps, minutes=run.minutes, **sized)


def train_adapter(run: Run) -> None:
    """The bundled adapter, over the exported model, by the same loss as ``ipadapter train``."""
    from ipadapter_trainer.files.provenance import export_adapter, provenance
    from ipadapter_trainer.models.base_model import load_base_model

    from .adapter import BATCH, LEARNING_RATE, fit_adapter
    from .loop import progress, training_device

    base_model = load_base_model(run.output / MODEL, device=training_device())
    checkpoint = run.work / "adapter.pt"
    sized = run.sized(BATCH, LEARNING_RATE)
    adapter = fit_adapter(base_model, run.train, checkpoint=checkpoint, steps=run.steps, minutes=run.minutes, **sized)
    done = progress(checkpoint)
    metadata = provenance(base_model, adapter.spec, steps=done.step, images_seen=done.images, seed=0)
    export_adapter(run.output / "adapter.safetensors", adapter, metadata)


def export_stack(run: Run) -> None:
    from .stack import export

    export(run.work, run.train, run.output)
    save_prompts(run.images, run.output / PROMPTS)


def unpack_stack(run: Run) -> None:
    from .stack import unpack

    unpack(run.output, run.work)


PARTS: dict[str, Callable[[Run], None]] = {
    "unpack": unpack_stack,
    "vae": train_vae,
    "decoder": train_decoder,
    "clip": train_clip,
    "vision": train_vision,
    "judge": train_judge,
    "unet": train_unet,
    "export": export_stack,
    "adapter": train_adapter,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--images", type=Path, help="pictures.zip of the builder (default: the bundled one)")
    parser.add_argument(
        "--output", type=Path, help="folder that export and adapter write to (default: the bundled one)"
    )
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of a part in all, earlier runs counted in")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop a part after this long")
    parser.add_argument(
        "--batch-size", type=int, help="images a step of vae, decoder, unet and adapter (default: 8, 8, 64, 64)"
    )
    arguments = parser.parse_args()
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size}: expected at least 1; leave it out for each part's own.")
    torch.backends.cuda.matmul.allow_tf32 = True  # small models in fp32, for which that is precise enough
    images = arguments.images or emoji_folder() / "pictures.zip"
    run = Run(
        images=images,
        train=load_images(images, "train"),
        work=arguments.work,
        output=arguments.output or emoji_folder(),
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch_size=arguments.batch_size,
    )
    for part in arguments.parts:
        PARTS[part](run)


if __name__ == "__main__":
    main()
