"""`ipadapter demo`: train an adapter for two minutes on real images, then show and measure what it does."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ipadapter_core import IPAdapter, load_adapter
from ipadapter_core.assets import MODEL, emoji_folder

from ..data.images import to_pil_images
from ..files.provenance import export_adapter, provenance
from ..models.base_model import BaseModel, load_base_model
from ..models.generate import generate
from ..models.image_features import encode_clip_images
from ..report.image_grid import draw_grid
from ..runtime.disk import whole_file
from ..training.adapted_unet import adapt_unet
from ..training.new_adapter import new_adapter
from ..training.optimizers import new_optimizer
from ..training.steps import check_loss, train_steps
from .batches import emoji_batches, encode_emoji
from .emoji import EmojiImages, load_images, normalize, to_pixels
from .quality import GUIDANCE, choose_references, closeness

TRAINING_IMAGES = 1500  # of 6,000: encoding them all would take the time that training needs
# 20 times the usual learning rate: a tiny adapter in two minutes, not a real one in days.
BATCH, LEARNING_RATE = 32, 2e-3
STEPS = 12
ROWS, MEASURED = 6, 24
SIDE = 128  # of an image in the grid; the model's own is 64
OTHER_TEXT = "cat face"


@dataclass(frozen=True)
class Column:
    """One column of the image: its title and how its images are made."""

    title: str
    text: str
    weight: float


COLUMNS = (
    Column("weight 0", "", 0.0),
    Column("weight 0.5", "", 0.5),
    Column("weight 1", "", 1.0),
    Column(f'1 + "{OTHER_TEXT}"', OTHER_TEXT, 1.0),
)


def demo(output: Path, adapter: str | None = None, minutes: float = 2.0, seed: int = 0) -> None:
    """Train (or load ``adapter``: a file, or "bundled"), draw the image, print the measured closeness."""
    started = time.monotonic()
    folder = emoji_folder()
    base_model = load_base_model(folder / MODEL)
    held_out = load_images(folder / "pictures.zip", "held_out")
    if adapter is None:
        trained = train_demo_adapter(base_model, load_images(folder / "pictures.zip", "train"), minutes, seed)
        file = output.with_suffix(".safetensors")
        metadata = provenance(
            base_model, trained.adapter.spec, steps=trained.steps, images_seen=trained.images, seed=seed
        )
        export_adapter(file, trained.adapter, metadata)
        print(f"Saved the adapter: {file} ({trained.steps} steps, {trained.images} images seen)")
        chosen = trained.adapter
    else:
        file = folder / "adapter.safetensors" if adapter == "bundled" else Path(adapter)
        chosen = load_adapter(file, dtype=torch.float32)
    rows = choose_references(held_out, MEASURED, seed)
    images = to_pixels(held_out.images[rows])
    embeds = encode_clip_images(base_model, normalize(images))
    alone = {weight: _generate(base_model, chosen, embeds, "", weight, seed) for weight in (0.0, 1.0)}
    columns = [
        alone[c.weight][:ROWS]
        if c.weight in alone and not c.text
        else _generate(base_model, chosen, embeds[:ROWS], c.text, c.weight, seed)
        for c in COLUMNS
    ]
    titles = ("image prompt", *(column.title for column in COLUMNS))
    shown = [to_pil_images(pixels) for pixels in (images[:ROWS], *columns)]
    drawn = draw_grid(list(zip(titles, shown, strict=True)), side=SIDE)
    with whole_file(output) as temporary:
        drawn.save(temporary)
    report(base_model, images, alone)
    print(f"Image: {output.resolve()} ({time.monotonic() - started:.0f} s in all)")


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter, its optimizer steps and the images it saw."""

    adapter: IPAdapter
    steps: int
    images: int


def train_demo_adapter(base_model: BaseModel, images: EmojiImages, minutes: float, seed: int) -> TrainedAdapter:
    """Train for ``minutes``, the encoding of the images included; the steps adapt to the machine."""
    deadline = time.monotonic() + 60 * minutes
    generator = torch.Generator().manual_seed(seed)
    some = images.subset(torch.randperm(len(images), generator=generator)[:TRAINING_IMAGES].tolist())
    print(f"Encoding {len(some)} images once ...", flush=True)
    torch.manual_seed(seed)
    adapter = new_adapter(base_model)
    features = encode_emoji(base_model, some, adapter.spec.feature, seed)
    optimizer = new_optimizer(adapter, LEARNING_RATE)
    parameters = sum(p.numel() for p in adapter.parameters())
    print(f"Training {parameters / 1e6:.2f} M parameters; the {base_model.name} UNet stays frozen.", flush=True)
    began, num_images, smooth, step = time.monotonic(), 0, None, 0
    batches = emoji_batches(features, BATCH, generator)
    with (
        adapt_unet(base_model, adapter) as model,
        closing(train_steps(model, batches, optimizer=optimizer, steps=1_000_000)) as training,
        tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar,
    ):
        for progress in training:
            now, step = time.monotonic(), progress.step
            num_images += progress.images
            loss = check_loss(step, progress.loss.item())
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            done = min(1.0, (now - began) / max(deadline - began, 1e-9))
            bar.set_postfix_str(
                f"step {step}, loss {smooth:.4f}, {num_images / (now - began):.0f} images/s", refresh=False
            )
            bar.update(100 * done - bar.n)
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 4 * (1 - done))  # falls in the last quarter
    return TrainedAdapter(adapter.requires_grad_(False).eval(), step, num_images)


def _generate(base_model: BaseModel, adapter: IPAdapter, embeds: Tensor, text: str, weight: float, seed: int) -> Tensor:
    return generate(
        base_model,
        adapter,
        prompts=[text],
        image_features=[embeds],
        weight=weight,
        steps=STEPS,
        guidance=GUIDANCE,
        seed=seed,
    )


def report(base_model: BaseModel, references: Tensor, generated: dict[float, Tensor]) -> None:
    """Print how often a generated image is closer to its own reference than to another one, with and without."""
    print(f"Closer to its own image prompt than to another one ({len(references)} held-out prompts, chance is 50 %):")
    for weight, title in ((0.0, "without adapter"), (1.0, "with adapter")):
        found = closeness(base_model, generated[weight], references)
        by_colour, by_clip = found["closer_by_histogram"], found["closer_by_clip"]
        print(f"  {title:16} by colour {by_colour:4.0%}   by the vision model {by_clip:4.0%}")
