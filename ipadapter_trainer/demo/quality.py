"""Measure how well an adapter steers the emoji model, on held-out concepts with fixed seeds, and write a JSON.

    python -m ipadapter_trainer.demo.quality --output quality.json

Two situations: an image alone, and an image with the text of another concept. Each is generated with the adapter and
without (weight 0), from the same noise; the control asks the same questions about references that are shuffled, so that
nothing but the image that was given can answer them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import IPAdapter, load_adapter
from ipadapter_core.assets import MODEL, emoji_folder

from ..data.preprocess import tokenize
from ..models.base_model import BaseModel, load_base_model
from ..models.generate import generate
from ..models.image_features import encode_clip_images
from .emoji import STYLE_NAMES, TEXT_CONCEPTS, EmojiImages, caption, load_images, normalize, styled_caption, to_pixels
from .judges import (
    StyleClassifier,
    classifier_state,
    closer_to_own,
    colour_histogram,
    histogram_similarity,
    judge_styles,
    read_judges,
)

PROMPTS = 64
STEPS, GUIDANCE = 25, 3.0
WEIGHT_ALONE, WEIGHT_WITH_TEXT = 1.0, 1.0


@dataclass(frozen=True)
class Judges:
    """The classifiers of generated images."""

    base_model: BaseModel
    classifier: StyleClassifier
    text_projection: Tensor

    def _token_ids(self, texts: list[str]) -> Tensor:
        return tokenize(self.base_model.tokenizers[:1], texts, self.base_model.text_length)[0]

    @torch.no_grad()
    def concepts(self, pixels: Tensor) -> Tensor:
        """int64 [N]: which of the sixteen text concepts each image shows, by CLIP against their captions.

        A concept is the mean of its captions in all styles, so that no style draws images to a concept.
        """
        captions = [styled_caption(caption(c), style) for c in TEXT_CONCEPTS for style in STYLE_NAMES]
        pooled = self.base_model.text_encoder(self._token_ids(captions)).pooler_output
        texts = F.normalize(pooled @ self.text_projection.T, dim=-1)
        concepts = texts.unflatten(0, (len(TEXT_CONCEPTS), len(STYLE_NAMES))).mean(dim=1)
        return (image_embeds(self.base_model, pixels) @ F.normalize(concepts, dim=-1).T).argmax(-1)

    @torch.no_grad()
    def styles_by_encoder(self, pixels: Tensor) -> Tensor:
        """int64 [N]: which of the styles the image encoder sees, by CLIP against "noto style" and the like."""
        captions = [f"{style} style" for style in STYLE_NAMES]
        pooled = self.base_model.text_encoder(self._token_ids(captions)).pooler_output
        texts = F.normalize(pooled @ self.text_projection.T, dim=-1)
        return torch.cat([image_embeds(self.base_model, chunk) @ texts.T for chunk in pixels.split(64)]).argmax(-1)


@torch.no_grad()
def image_embeds(base_model: BaseModel, pixels: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] -> unit CLIP embeddings [N, D]."""
    return F.normalize(encode_clip_images(base_model, normalize(pixels)), dim=-1)


def closeness(base_model: BaseModel, generated: Tensor, references: Tensor) -> dict[str, float]:
    """Probability that a generated image is closer to its own reference than to a random other one."""
    histograms = histogram_similarity(colour_histogram(generated), colour_histogram(references))
    embeds = image_embeds(base_model, generated) @ image_embeds(base_model, references).T
    return {"closer_by_histogram": closer_to_own(histograms.cpu()), "closer_by_clip": closer_to_own(embeds.cpu())}


def load_judges(base_model: BaseModel, file: Path) -> Judges:
    """Read judges.safetensors. Raises BaseModelError for another or a damaged file."""
    state = read_judges(file)
    classifier = StyleClassifier()
    classifier.load_state_dict(classifier_state(state, "style_classifier"))
    return Judges(base_model, classifier.eval(), state["text_projection.weight"].float())


def choose_references(images: EmojiImages, count: int = PROMPTS, seed: int = 0) -> list[int]:
    """Rows of distinct concepts in a seeded order, each in a seeded one of its styles."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, int] = {}
    for row in torch.randperm(len(images), generator=generator).tolist():
        chosen.setdefault(images.concepts[row], row)
    return list(chosen.values())[:count]


def evaluate(base_model: BaseModel, adapter: IPAdapter, judges: Judges, images: EmojiImages, seed: int = 0) -> dict:
    """Generate both situations with and without the adapter and let the judges answer."""
    rows = choose_references(images, seed=seed)
    references, styles = to_pixels(images.images[rows]), images.style_ids[rows]
    embeds = encode_clip_images(base_model, normalize(references))
    wanted = torch.arange(len(rows)) % len(TEXT_CONCEPTS)
    prompts = [caption(TEXT_CONCEPTS[i]) for i in wanted.tolist()]
    shuffled = torch.arange(len(rows)).roll(1)

    def run(texts: list[str], weight: float) -> Tensor:
        return generate(
            base_model,
            adapter,
            prompts=texts,
            image_features=[embeds],
            weight=weight,
            steps=STEPS,
            guidance=GUIDANCE,
            seed=seed,
        )

    def style(pixels: Tensor, order: Tensor) -> float:
        return share(judge_styles(judges.classifier, pixels) == styles[order])

    def alone(pixels: Tensor, order: Tensor) -> dict[str, float]:
        return {**closeness(base_model, pixels, references[order]), "style": style(pixels, order)}

    def with_text(pixels: Tensor, order: Tensor) -> dict[str, float]:
        return {"style": style(pixels, order), "concept": share(judges.concepts(pixels) == wanted)}

    own = torch.arange(len(rows))
    in_words = [styled_caption(images.captions[row], images.styles[row]) for row in rows]
    every = to_pixels(images.images)
    result: dict[str, object] = {
        # What an adapter can reach at most with this model: the styles its encoder sees, and those its UNet draws.
        "limits": {
            "style_seen_by_the_image_encoder": share(judges.styles_by_encoder(every) == images.style_ids),
            "style_asked_in_words": style(run(in_words, 0.0), own),
        }
    }
    for name, ask, texts, weight in (
        ("image_only", alone, [""] * len(rows), WEIGHT_ALONE),
        ("image_and_text", with_text, prompts, WEIGHT_WITH_TEXT),
    ):
        steered = run(texts, weight)
        result[name] = {
            "weight": weight,
            "adapter": ask(steered, own),
            "weight_0": ask(run(texts, 0.0), own),
            "shuffled_references": ask(steered, shuffled),
        }
    return result


def judge_the_judges(judges: Judges, held_out: EmojiImages, train: EmojiImages) -> dict[str, float]:
    """How often the judges are right on real images: styles on all held-out ones, concepts on the sixteen."""
    styles = judge_styles(judges.classifier, to_pixels(held_out.images))
    rows = [i for i, concept in enumerate(train.concepts) if concept in TEXT_CONCEPTS]
    truth = torch.tensor([TEXT_CONCEPTS.index(train.concepts[i]) for i in rows])
    return {
        "style_on_real_held_out": share(styles == held_out.style_ids),
        "concept_on_real": share(judges.concepts(to_pixels(train.images[rows])) == truth),
    }


def share(hits: Tensor) -> float:
    """The share of true values."""
    return hits.float().mean().item()


def measure(adapter_file: Path, seed: int = 0) -> dict[str, object]:
    """The whole table for one adapter file over the bundled model."""
    folder = emoji_folder()
    base_model = load_base_model(folder / MODEL)
    judges = load_judges(base_model, folder / "judges.safetensors")
    held_out = load_images(folder / "pictures.zip", "held_out")
    train = load_images(folder / "pictures.zip", "train")
    return {
        "prompts": PROMPTS,
        "seed": seed,
        "sampler": f"{DDIMScheduler.__name__}, {STEPS} steps, guidance {GUIDANCE}",
        "judges": judge_the_judges(judges, held_out, train),
        **evaluate(base_model, load_adapter(adapter_file, dtype=torch.float32), judges, held_out, seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="adapter file (default: the bundled one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    result = measure(arguments.adapter or emoji_folder() / "adapter.safetensors", arguments.seed)
    text = json.dumps(result, indent=2) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
