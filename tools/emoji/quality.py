"""Measure how well an adapter steers the emoji model, on held-out images with fixed seeds, and write a JSON.

    python -m tools.emoji.quality --output quality.json
    python -m tools.emoji.quality --quiz quiz.png

Four situations: an image alone, an image with the text of another concept, an image with its own name, and an image of
a concept that no training saw. Each is generated with the adapter and without (weight 0), from the same noise; the
control asks the same questions about references that are shuffled, so that nothing but the image that was given can
answer them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ipadapter_core import IPAdapter, load_adapter
from ipadapter_core.assets import MODEL, emoji_folder
from ipadapter_trainer.demo.closeness import choose_references, closeness
from ipadapter_trainer.demo.emoji import EmojiImages, caption, load_images, normalize, styled_caption, to_pixels
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.generate import generate
from ipadapter_trainer.models.image_features import encode_clip_images

from .concepts import CONCEPTS, TEXT_CONCEPTS
from .judges import (
    JUDGES_FILE,
    ConceptClassifier,
    StyleClassifier,
    choose_among,
    classifier_state,
    concept_ids,
    judge,
    read_judges,
)
from .loop import training_device
from .sheets import GUIDANCE, STEPS, WEIGHT, WEIGHT_BESIDE_TEXT, draw_quiz, draw_sheet

PROMPTS = 128
CHOICES = 16  # concepts that the judge chooses among


def share(hits: Tensor) -> float:
    """The share of true values."""
    return hits.float().mean().item()


@dataclass(frozen=True)
class Judges:
    """The classifiers of generated images."""

    base_model: BaseModel
    styles: StyleClassifier
    concepts: ConceptClassifier

    def style(self, pixels: Tensor, wanted: Tensor) -> float:
        """Share of the images in the wanted style [N]."""
        return share(judge(self.styles, pixels).argmax(-1) == wanted.to(pixels.device))

    def concept(self, pixels: Tensor, candidates: Tensor, wanted: Tensor) -> float:
        """Share of the images that show the wanted one [N] of their candidates [N, K]."""
        found = choose_among(judge(self.concepts, pixels), candidates.to(pixels.device))
        return share(found == wanted.to(pixels.device))


def load_judges(base_model: BaseModel, file: Path) -> Judges:
    """Read judges.safetensors. Raises BaseModelError for another or a damaged file."""
    state = read_judges(file)
    styles, concepts = StyleClassifier(), ConceptClassifier()
    styles.load_state_dict(classifier_state(state, "styles"))
    concepts.load_state_dict(classifier_state(state, "concepts"))
    device = base_model.device
    return Judges(base_model, styles.eval().to(device), concepts.eval().to(device))


def candidates_of(concepts: Tensor, known: Tensor, seed: int = 0) -> Tensor:
    """[N, CHOICES] concept ids: each row's own first, then others drawn from ``known``."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for own in concepts.tolist():
        others = known[known != own]
        rows.append(
            torch.cat([torch.tensor([own]), others[torch.randperm(len(others), generator=generator)]])[:CHOICES]
        )
    return torch.stack(rows)


def evaluate(
    base_model: BaseModel,
    adapter: IPAdapter,
    judges: Judges,
    held_out: EmojiImages,
    unseen: EmojiImages,
    prompts: int = PROMPTS,
    seed: int = 0,
) -> dict[str, object]:
    """Generate every situation with and without the adapter and let the judges answer."""
    known = concept_ids(held_out)
    some = held_out.subset(choose_references(held_out, prompts, seed))
    own_concepts = candidates_of(concept_ids(some), known, seed)
    wanted = torch.arange(len(some)) % len(TEXT_CONCEPTS)
    text_concepts = torch.tensor([CONCEPTS.index(concept) for concept in TEXT_CONCEPTS]).expand(len(some), -1)
    first = torch.zeros(len(some), dtype=torch.long)
    others = [caption(TEXT_CONCEPTS[i]) for i in wanted.tolist()]
    in_words = [styled_caption(c, s) for c, s in zip(some.captions, some.styles, strict=True)]
    new = unseen.subset(choose_references(unseen, prompts, seed))

    def run(of: EmojiImages, texts: list[str], weight: float) -> Tensor:
        pixels = to_pixels(of.images).to(base_model.device)
        features = encode_clip_images(base_model, normalize(pixels), adapter.spec.feature)
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

    def answers(pixels: Tensor, of: EmojiImages, order: Tensor, asked: str) -> dict[str, float]:
        references = to_pixels(of.images[order]).to(pixels.device)
        found = {"style": judges.style(pixels, of.style_ids[order])}
        if asked == "image_and_text":
            return found | {"concept_of_the_text": judges.concept(pixels, text_concepts, wanted)}
        found |= closeness(base_model, pixels, references)
        if asked != "unseen_concept":
            found["concept"] = judges.concept(pixels, own_concepts[order], first)
        return found

    names = {"style": judges.style(run(some, in_words, 0.0), some.style_ids)}
    names["concept"] = judges.concept(run(some, list(some.captions), 0.0), own_concepts, first)
    result: dict[str, object] = {"text_alone": names}  # what the base model draws without any adapter
    for asked, of, texts, weight in (
        ("image_alone", some, [""] * len(some), WEIGHT),
        ("image_and_text", some, others, WEIGHT_BESIDE_TEXT),
        ("image_and_its_name", some, list(some.captions), WEIGHT),
        ("unseen_concept", new, [""] * len(new), WEIGHT),
    ):
        steered = run(of, texts, weight)
        own = torch.arange(len(of))
        result[asked] = {
            "prompts": len(of),
            "weight": weight,
            "adapter": answers(steered, of, own, asked),
            "weight_0": answers(run(of, texts, 0.0), of, own, asked),
            "shuffled_references": answers(steered, of, own.roll(1), asked),
        }
    return result


def judge_the_judges(judges: Judges, held_out: EmojiImages, seed: int = 0) -> dict[str, float]:
    """How often the judges are right on the real held-out images."""
    pixels = to_pixels(held_out.images).to(judges.base_model.device)
    concepts = concept_ids(held_out)
    first = torch.zeros(len(held_out), dtype=torch.long)
    return {
        "style": judges.style(pixels, held_out.style_ids),
        "concept": judges.concept(pixels, candidates_of(concepts, concepts, seed), first),
    }


def measure(folder: Path, adapter_file: Path, images: Path, prompts: int = PROMPTS, seed: int = 0) -> dict[str, object]:
    """The whole table for one adapter file over the model of this folder."""
    base_model = load_base_model(folder / MODEL, device=training_device())
    judges = load_judges(base_model, folder / JUDGES_FILE)
    held_out, unseen = load_images(images, "held_out"), load_images(images, "unseen")
    adapter = load_adapter(adapter_file, dtype=torch.float32).to(base_model.device)
    return {
        "seed": seed,
        "sampler": f"{DDIMScheduler.__name__}, {STEPS} steps, guidance {GUIDANCE}",
        "judges_on_real_held_out_images": judge_the_judges(judges, held_out, seed),
        **evaluate(base_model, adapter, judges, held_out, unseen, prompts, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="the model, its judges and its adapters (default: the bundled ones)"
    )
    parser.add_argument("--images", type=Path, help="pictures.zip of tools.emoji.build (default: that in the folder)")
    parser.add_argument("--adapter", type=Path, help="adapter file (default: adapter.safetensors in the folder)")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="measure, and write this JSON")
    parser.add_argument("--sheet", type=Path, help="draw some of the images into this file")
    parser.add_argument(
        "--quiz", type=Path, help="draw 16 prompts, and their images in another order; print the answer"
    )
    arguments = parser.parse_args()
    if not (arguments.output or arguments.sheet or arguments.quiz):
        parser.error("name a file for --output, --sheet or --quiz")
    folder = arguments.folder or emoji_folder()
    images = arguments.images or folder / "pictures.zip"
    adapter = arguments.adapter or folder / "adapter.safetensors"
    if arguments.sheet or arguments.quiz:
        base_model = load_base_model(folder / MODEL, device=training_device())
        held_out = load_images(images, "held_out")
        shown = load_adapter(adapter, dtype=torch.float32).to(base_model.device)
        if arguments.sheet:
            draw_sheet(base_model, shown, held_out, min(16, arguments.prompts)).save(arguments.sheet)
        if arguments.quiz:
            drawn, solution = draw_quiz(base_model, shown, held_out, arguments.seed)
            drawn.save(arguments.quiz)
            print(solution)
    if arguments.output:
        result = measure(folder, adapter, images, arguments.prompts, arguments.seed)
        text = json.dumps(result, indent=2) + "\n"
        arguments.output.write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
