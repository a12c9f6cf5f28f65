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

from ..data.images import check_image_file, to_pil_images
from ..files.provenance import export_adapter, provenance
from ..models.base_model import BaseModel, load_base_model
from ..models.generate import generate
from ..models.image_features import encode_clip_images
from ..report.image_grid import draw_grid
from ..runtime.disk import whole_file
from ..settings.kinds import TRAIN_KINDS
from ..training.adapted_unet import adapt_unet
from ..training.new_adapter import new_adapter
from ..training.optimizers import new_optimizer
from ..training.steps import check_loss, train_steps
from .alignment import Alignment, cancel_empty_text
from .batches import EmojiFeatures, caption_states, emoji_batches, encode_emoji
from .closeness import choose_references, closeness
from .emoji import EmojiImages, load_images, normalize, to_pixels

# 5 times the usual learning rate: a tiny adapter in two minutes, not a real one in days. A higher one, or one without
# warm-up, destroys what the aligned start knows.
BATCH, LEARNING_RATE, WARMUP = 32, 5e-4, 8
ALIGN_BATCH, ALIGN_SHARE = 64, 0.3  # of the training time, for the projector alone
STEPS, GUIDANCE = 12, 3.0
ROWS, MEASURED = 6, 24
OTHER_TEXT = "cat face"


@dataclass(frozen=True)
class Column:
    """One column of the image: its title and how its images are made; without a text, each has its own name."""

    title: str
    text: str | None
    weight: float


COLUMNS = (
    Column("its name", None, 0.0),
    Column("name and image", None, 1.0),
    Column("image alone", "", 1.0),
    Column(f'"{OTHER_TEXT}", 0.7', OTHER_TEXT, 0.7),
)


def demo(output: Path, adapter: str | None = None, minutes: float = 2.0, seed: int = 0) -> None:
    """Train (or load ``adapter``: a file, or "bundled"), draw the image, print the measured closeness.

    Raises TrainerError, before the training, for an output that is no image file.
    """
    check_image_file(output)
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
    prompts = held_out.subset(choose_references(held_out, MEASURED, seed))
    images = to_pixels(prompts.images)
    features = encode_clip_images(base_model, normalize(images), chosen.spec.feature)
    alone = {weight: _generate(base_model, chosen, features, [""] * MEASURED, weight, seed) for weight in (0.0, 1.0)}
    columns = [("image prompt", images[:ROWS])]
    for column in COLUMNS:
        texts = list(prompts.captions[:ROWS]) if column.text is None else [column.text] * ROWS
        pixels = (
            alone[column.weight][:ROWS]
            if column.text == ""
            else _generate(base_model, chosen, features[:ROWS], texts, column.weight, seed)
        )
        columns.append((column.title, pixels))
    drawn = draw_grid([(title, to_pil_images(pixels)) for title, pixels in columns], side=held_out.size)
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
    """Train a plus adapter for ``minutes``, the encoding of the images included; the steps adapt to the machine."""
    deadline = time.monotonic() + 60 * minutes
    generator = torch.Generator().manual_seed(seed)
    print(f"Encoding {len(images)} images once ...", flush=True)
    torch.manual_seed(seed)
    adapter = new_adapter(base_model, TRAIN_KINDS["plus"])
    features = encode_emoji(base_model, images, adapter.spec.feature, seed)
    aligned = min(deadline, time.monotonic() + 60 * minutes * ALIGN_SHARE)
    _align(base_model, adapter, images, features, aligned, generator)
    optimizer = new_optimizer(adapter, LEARNING_RATE / (WARMUP + 1))
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
            factor = min(1.0, (step + 1) / (WARMUP + 1), 4 * (1 - done))  # falls in the last quarter
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
    return TrainedAdapter(adapter.requires_grad_(False).eval(), step, num_images)


def _align(
    base_model: BaseModel,
    adapter: IPAdapter,
    images: EmojiImages,
    features: EmojiFeatures,
    deadline: float,
    generator: torch.Generator,
) -> None:
    """Train the projector on what the captions say of the images, and let the values draw that."""
    print("The projector learns what the captions say of the images ...", flush=True)
    states = caption_states(base_model, images, features).flatten(0, 1)
    alignment = Alignment(features.image_features.flatten(0, 1), states)
    alignment = alignment.with_no_image(base_model, adapter.spec, features.no_text)
    cancel_empty_text(base_model, adapter, features.latents.flatten(0, 1), states, features.no_text, generator)
    optimizer = torch.optim.AdamW(adapter.projector.parameters(), lr=LEARNING_RATE)
    while time.monotonic() < deadline:
        loss = alignment.loss(adapter, ALIGN_BATCH, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _generate(
    base_model: BaseModel, adapter: IPAdapter, features: Tensor, texts: list[str], weight: float, seed: int
) -> Tensor:
    return generate(
        base_model,
        adapter,
        prompts=texts,
        image_features=[features],
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
