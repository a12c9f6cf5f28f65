"""The stack's CLIP: a text encoder, its tokenizer and a vision encoder, trained together contrastively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, caption, styled_caption, to_pixels
from ipadapter_trainer.demo.views import mirror, shift

from .concepts import CONCEPTS
from .loop import LossFunction, device_of, training_device
from .views import any_colours, patchwork, zoom
from .vision import CELLS, PATCHES, WIDTH, Said, patch_colours, run_tower

MAX_TOKENS = 16
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


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 [B, 16], padded with the end token as SD1.5 does."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def text_states(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[N, 16, 128] on the encoder's device: the last hidden states that condition the UNet."""
    ids = tokenize(tokenizer, texts).to(device_of(text_encoder))
    return torch.cat([text_encoder(chunk).last_hidden_state for chunk in ids.split(256)])


def said_of(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Said:
    """The text states of all concepts in all styles."""
    texts = [styled_caption(caption(concept), style) for concept in CONCEPTS for style in STYLE_NAMES]
    end = cast("int", tokenizer.eos_token_id)
    ends = torch.eq(tokenize(tokenizer, texts), end).int().argmax(dim=1)  # the first of several
    counted = torch.arange(MAX_TOKENS) < ends[:, None]
    states, shape = text_states(text_encoder, tokenizer, texts), (len(CONCEPTS), len(STYLE_NAMES))
    return Said(states.unflatten(0, shape), counted.float()[..., None].to(states).unflatten(0, shape))


class EmojiCLIP(CLIPModel):
    """A small CLIP, and a head for the colours of its patches that is used in training only."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.patch_colours = nn.Linear(WIDTH, 3 * CELLS**2)


def new_clip(tokenizer: CLIPTokenizer, size: int) -> EmojiCLIP:
    """A small CLIP over images of ``size`` pixels a side; random weights."""
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
    patches = {"image_size": size, "patch_size": size // PATCHES}
    vision = {**shared, **patches, "num_hidden_layers": 4, "projection_dim": WIDTH}
    return EmojiCLIP(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def clip_losses(images: EmojiImages, tokenizer: CLIPTokenizer, concepts: int = 32, pairs: int = 64) -> LossFunction:
    """Four losses, each for something that an image prompt has to carry.

    ``text``: image against caption (CLIP, arXiv 2103.00020); a batch holds each drawn concept in all its styles,
    so the concept alone does not win. ``style``: images, parts of images and patchworks of one style against the
    captions that name only a style, so that the concept cannot stand for it. ``image``: some of the images
    against a part of themselves (SLIP, arXiv 2112.12750), which keeps what captions do not say, shapes above all.
    ``patches``: the colours of each patch, read from its penultimate state, which is what a plus adapter is given.
    Only the last two see recoloured images.
    """
    device = training_device()
    captions = [styled_caption(c, s) for c, s in zip(images.captions, images.styles, strict=True)]
    styled = tokenize(tokenizer, captions).to(device)
    style_only = tokenize(tokenizer, [f"{style} style" for style in STYLE_NAMES]).to(device)
    styles, everything = images.style_ids.to(device), images.images.to(device)
    rows_of: dict[str, list[int]] = {}
    for row, concept in enumerate(images.concepts):
        rows_of.setdefault(concept, []).append(row)
    groups = list(rows_of.values())
    most = max(map(len, groups))
    # Every concept in every style; a style that is kept back is filled up with another of the concept's.
    table = torch.tensor([(group * most)[:most] for group in groups], device=device)
    same_style = styles == torch.arange(len(STYLE_NAMES), device=device)[:, None]

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, EmojiCLIP)
        rows = table[_permutation(len(table), generator)[:concepts]].flatten()
        again = _permutation(len(rows), generator)[:pairs]
        some = rows[again]
        others = torch.multinomial(same_style[styles[some]].float(), 1, generator=generator).flatten()
        pixels = to_pixels(everything[rows])
        recoloured = any_colours(mirror(pixels[again], generator), generator)
        views = [
            shift(mirror(pixels, generator), generator),
            zoom(mirror(pixels[again], generator), generator, smallest=0.5),
            patchwork(
                shift(pixels[again], generator),
                shift(mirror(to_pixels(everything[others]), generator), generator),
                generator,
            ),
            shift(recoloured, generator),
            zoom(recoloured, generator, smallest=0.5),
        ]
        embeds, colour_error = embed_some_patches(model, torch.cat(views), generator)
        whole, zoomed, mixed, natural, part = embeds.split([len(view) for view in views])
        ids = torch.cat([styled[rows], style_only])
        pooled = model.text_model(ids).pooler_output
        texts, named = F.normalize(model.text_projection(pooled), dim=-1).split([len(rows), len(style_only)])
        scale = model.logit_scale.exp().clamp(max=50)
        text = contrast(whole, texts, scale, rows)
        truth = styles[torch.cat([rows, some, some])]
        style = F.cross_entropy(scale * torch.cat([whole, zoomed, mixed]) @ named.T, truth)
        image = contrast(natural, part, 10.0, some)
        return {
            "loss": text + style + 0.5 * image + 2 * colour_error,
            "text": text.detach(),
            "style": style.detach(),
            "image": image.detach(),
            "patches": colour_error.detach(),
        }

    return losses


def contrast(a: Tensor, b: Tensor, scale: Tensor | float, rows: Tensor) -> Tensor:
    """Symmetric InfoNCE of matching rows of a and b, both [B, D] and of unit length; equal ``rows`` [B] match."""
    logits = scale * a @ b.T
    same = (rows[:, None] == rows).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _permutation(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device).argsort()


def embed_some_patches(
    model: EmojiCLIP, pixels: Tensor, generator: torch.Generator, share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] in [-1, 1] -> unit image embeddings [B, D], and the absolute error of the patches' colours.

    Seen are the class token and a random ``share`` of each image's patches: half the work, and a small data set
    is learned by heart much later (FLIP, arXiv 2212.00794).
    """
    drawn = torch.rand(len(pixels), PATCHES**2, generator=generator, device=pixels.device).argsort(dim=1)
    kept = drawn[:, : round(share * PATCHES**2)]
    states, pooled = run_tower(model.vision_model, pixels, kept)
    colours = model.patch_colours(states[:, 1:])
    embeds = F.normalize(model.visual_projection(pooled).float(), dim=-1)
    wanted = patch_colours(pixels).gather(1, kept[..., None].expand(-1, -1, colours.shape[-1]))
    return embeds, (colours.float() - wanted).abs().mean()
