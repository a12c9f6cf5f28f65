"""Sheets of generated images to look at: samples, and a quiz for strangers."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ipadapter_core import IPAdapter
from ipadapter_trainer.data.images import to_pil_images
from ipadapter_trainer.demo.closeness import choose_references
from ipadapter_trainer.demo.emoji import EmojiImages, caption, normalize, to_pixels
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.generate import generate
from ipadapter_trainer.models.image_features import encode_clip_images
from ipadapter_trainer.report.image_grid import draw_grid

from .concepts import TEXT_CONCEPTS

STEPS, GUIDANCE = 25, 3.0
WEIGHT, WEIGHT_BESIDE_TEXT = 1.0, 0.5  # the latter when the text names something else
QUIZ, COLUMNS = 16, 8
LABEL, GAP = 22, 8  # pixels


def draw_sheet(base_model: BaseModel, adapter: IPAdapter, images: EmojiImages, rows: int = 16) -> Image.Image:
    """A row for each of the first references: the image prompt, and what it becomes alone and beside two texts."""
    some = images.subset(choose_references(images, rows))
    others = [caption(TEXT_CONCEPTS[row % len(TEXT_CONCEPTS)]) for row in range(len(some))]
    columns = [("image prompt", to_pixels(some.images))]
    for title, texts, weight in (
        ("image alone", [""] * len(some), WEIGHT),
        ("its name alone", list(some.captions), 0.0),
        ("its name and image", list(some.captions), WEIGHT),
        ("another text", others, WEIGHT_BESIDE_TEXT),
    ):
        columns.append((title, _draw(base_model, adapter, some, texts, weight)))
    return draw_grid([(title, to_pil_images(images)) for title, images in columns], side=images.size)


def draw_quiz(base_model: BaseModel, adapter: IPAdapter, images: EmojiImages, seed: int = 0) -> tuple[Image.Image, str]:
    """Sixteen image prompts with numbers above what was generated from them alone, with letters and in another order;
    and the solution, such as "A 7, B 12".
    """
    some = images.subset(choose_references(images, QUIZ, seed))
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed)).tolist()
    generated = _draw(base_model, adapter, some, [""] * len(some), WEIGHT)[order]
    numbers = [str(number) for number in range(1, len(some) + 1)]
    letters = [chr(ord("A") + place) for place in range(len(some))]
    blocks = [_labelled(to_pixels(some.images), numbers), _labelled(generated, letters)]
    sheet = Image.new("RGB", (blocks[0].width, sum(block.height for block in blocks) + 3 * GAP), "white")
    sheet.paste(blocks[0], (0, 0))
    sheet.paste(blocks[1], (0, blocks[0].height + 3 * GAP))
    line = blocks[0].height + GAP
    ImageDraw.Draw(sheet).line([(GAP, line), (sheet.width - GAP, line)], fill="grey")
    return sheet, ", ".join(f"{letter} {numbers[row]}" for letter, row in zip(letters, order, strict=True))


def _labelled(pixels: Tensor, labels: list[str]) -> Image.Image:
    """Rows of ``COLUMNS`` images, each with its label above."""
    side, font = pixels.shape[-1], ImageFont.load_default(size=LABEL - 4)
    width, height, rows = side + GAP, side + LABEL + GAP, -(-len(labels) // COLUMNS)
    block = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(block)
    for place, (image, label) in enumerate(zip(to_pil_images(pixels), labels, strict=True)):
        left, top = GAP + place % COLUMNS * width, GAP + place // COLUMNS * height
        pen.text((left + side / 2, top), label, fill="black", font=font, anchor="mt")
        block.paste(image, (left, top + LABEL))
    return block


def _draw(base_model: BaseModel, adapter: IPAdapter, images: EmojiImages, texts: list[str], weight: float) -> Tensor:
    pixels = normalize(to_pixels(images.images).to(base_model.device))
    return generate(
        base_model,
        adapter,
        prompts=texts,
        image_features=[encode_clip_images(base_model, pixels, adapter.spec.feature)],
        weight=weight,
        steps=STEPS,
        guidance=GUIDANCE,
    ).cpu()
