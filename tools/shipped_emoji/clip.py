"""The stack's CLIP: a text encoder, its tokenizer and a vision encoder, trained together contrastively."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ipadapter_trainer.demo.emoji import (
    STYLE_NAMES,
    EmojiImages,
    augment,
    normalize,
    pick,
    styled_caption,
    to_pixels,
    zoom,
)

from .loop import LossFunction, device_of

MAX_TOKENS = 16
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: list[str], folder: Path, size: int = 2048) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from the captions and save it as CLIP's vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Every printable ASCII character is in the alphabet: no prompt is ever unknown.
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for token in [*alphabet, *(c + "</w>" for c in alphabet), START, END]:
        vocabulary.setdefault(token, len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokenizer_ = CLIPTokenizer.from_pretrained(str(folder), model_max_length=MAX_TOKENS)
    tokenizer_.save_pretrained(str(folder))
    return tokenizer_


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP over 64 px images; random weights.

    Patches of 8 px: a style is in outlines and shading, which larger patches show only to a longer training.
    """
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": WIDTH,
    }
    vision = {**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8, "projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 [B, 16], padded with the end token as SD1.5 does."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


def clip_losses(images: EmojiImages, tokenizer: CLIPTokenizer, concepts: int = 24, pairs: int = 48) -> LossFunction:
    """Three contrasts, each for something that an image prompt has to carry.

    ``text``: image against caption (CLIP, arXiv 2103.00020); a batch holds each drawn concept in all its styles,
    so the concept alone does not win. ``style``: images, parts of images and patchworks of one style against the
    five captions that name only a style, so that the concept cannot stand for it. ``image``: some of the images
    against a part of themselves (SLIP, arXiv 2112.12750), which keeps what captions do not say, colours and shapes
    above all. No colour is ever changed.
    """
    captions = [styled_caption(c, s) for c, s in zip(images.captions, images.styles, strict=True)]
    styled = tokenize(tokenizer, captions)
    style_only = tokenize(tokenizer, [f"{style} style" for style in STYLE_NAMES])
    styles = images.style_ids
    pixels = to_pixels(images.images)
    rows_of: dict[str, list[int]] = {}
    for row, concept in enumerate(images.concepts):
        rows_of.setdefault(concept, []).append(row)
    groups = list(rows_of.values())
    same_style = [(styles == style).nonzero().flatten() for style in range(len(STYLE_NAMES))]

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, CLIPModel)
        drawn = torch.randperm(len(groups), generator=generator)[:concepts].tolist()
        rows = torch.tensor([row for group in drawn for row in groups[group]])
        again = torch.randperm(len(rows), generator=generator)[:pairs]
        others = torch.stack([pick(same_style[style], generator) for style in styles[rows[again]].tolist()])
        views = [
            augment(pixels[rows], generator),
            zoom(augment(pixels[rows[again]], generator), generator, smallest=0.5),
            patchwork(augment(pixels[rows[again]], generator), augment(pixels[others], generator), generator),
        ]
        device = device_of(model)
        ids = torch.cat([styled[rows], style_only]).to(device)
        image_embeds = embed_some_patches(model, normalize(torch.cat(views).to(device)), generator)
        pooled = model.text_model(ids).pooler_output
        texts, named = F.normalize(model.text_projection(pooled), dim=-1).split([len(rows), len(style_only)])
        scale = model.logit_scale.exp().clamp(max=50)
        whole, parts, _ = image_embeds.split([len(rows), len(again), len(again)])
        text = contrast(whole, texts, scale)
        truth = styles[torch.cat([rows, rows[again], rows[again]])].to(device)
        style = F.cross_entropy(scale * image_embeds @ named.T, truth)
        image = contrast(whole[again], parts, 10.0)
        return {
            "loss": text + style + 0.5 * image,
            "text": text.detach(),
            "style": style.detach(),
            "image": image.detach(),
        }

    return losses


def embed_some_patches(
    model: CLIPModel, pixel_values: Tensor, generator: torch.Generator, share: float = 0.5
) -> Tensor:
    """Unit image embeddings [B, D] from the class token and a random ``share`` of each image's patches.

    Half the work, and a small data set is learned by heart much later (FLIP, arXiv 2212.00794).
    """
    vision = model.vision_model
    tokens = vision.embeddings(pixel_values)
    patches = torch.rand(len(tokens), tokens.shape[1] - 1, generator=generator).argsort(dim=1)
    kept = 1 + patches[:, : round(share * patches.shape[1])].to(tokens.device)
    chosen = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
    tokens = vision.pre_layrnorm(torch.cat([tokens[:, :1], chosen], dim=1))
    states = vision.encoder(inputs_embeds=tokens).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(states[:, 0])), dim=-1)


def contrast(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of matching rows of a and b, both [B, D] and of unit length."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def patchwork(pixels: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """The left or right part of each image, and the rest from another (CutMix, arXiv 1905.04899)."""
    width = pixels.shape[-1]
    edges = torch.randint(width // 4, 3 * width // 4, (len(pixels), 1, 1, 1), generator=generator)
    return torch.where(torch.arange(width) < edges, pixels, others)
