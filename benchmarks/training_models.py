"""Random base models in the SD1.5 layout, pictures with captions, and what each part of the model computes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from ipadapter_trainer.emoji.clip import train_tokenizer
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

TEXT_LENGTH = 77
ENCODER_SIDE = 224  # the original resizes every reference picture to this
WORDS = (
    ("a red", "a small", "an old", "a shining", "a paper", "a wooden"),
    ("boat", "lamp", "fox", "bicycle", "castle", "teapot", "violin"),
    ("on a table", "in the rain", "under trees", "by the sea", "at night"),
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of the parts; text and vision are (width, layers, heads)."""

    resolution: int  # of the training pictures, in pixels
    picture: tuple[int, int]  # width and height of the files, in pixels
    unet: tuple[int, ...]
    vae: tuple[int, ...]
    text: tuple[int, int, int]
    vision: tuple[int, int, int]
    image_width: int  # of the image embedding
    vocabulary: int


# tiny: a fifth of the widths and a quarter of the side, with depths that keep each part's share of the arithmetic.
SIZES: Mapping[str, Size] = {
    "tiny": Size(128, (192, 160), (64, 128, 256, 256), (24, 48, 96, 96), (160, 1, 4), (160, 4, 4), 160, 512),
    "sd15": Size(
        512, (1024, 768), (320, 640, 1280, 1280), (128, 256, 512, 512), (768, 12, 12), (1280, 32, 16), 1024, 49408
    ),
}


def write_base_model(folder: Path, size: Size, device: str) -> Path:
    """A diffusers folder with an image_encoder inside, float32; the weights are drawn on `device`."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    if len(tokenizer) > size.vocabulary:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {size.vocabulary}")
    torch.manual_seed(0)
    for name, make in part_makers(size, tokenizer).items():
        with torch.device(device):
            part = make()
        part.save_pretrained(folder / name)
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, for the words of the captions, with its length of 77."""
    train_tokenizer(captions(), folder, size=400)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def part_makers(size: Size, tokenizer: CLIPTokenizer | None = None) -> dict[str, Callable[[], Any]]:
    """The parts of a diffusers folder that have weights, by the names of their folders."""
    blocks = len(size.vae)
    groups = 32 if size.unet[0] % 32 == 0 and size.vae[0] % 32 == 0 else 8
    return {
        "unet": lambda: UNet2DConditionModel(
            sample_size=size.resolution // 8,
            block_out_channels=size.unet,
            cross_attention_dim=size.text[0],
            attention_head_dim=8,
            norm_num_groups=groups,
        ),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=size.vae,
            layers_per_block=2,
            norm_num_groups=groups,
            sample_size=size.resolution,
        ),
        "text_encoder": lambda: CLIPTextModel(_text_config(size, tokenizer)),
        "image_encoder": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **_transformer(size.vision),
                hidden_act="gelu",
                image_size=ENCODER_SIDE,
                patch_size=14,
                projection_dim=size.image_width,
            )
        ),
    }


def part_flops(size: Size) -> dict[str, int]:
    """Floating-point operations of each part for one picture: UNet forward and backward, the others forward.

    The UNet's weights are frozen, its context is not, as for an adapter. Nothing is computed: all tensors are meta.
    """
    latent = size.resolution // 8
    with torch.device("meta"):
        parts = {name: make().requires_grad_(False) for name, make in part_makers(size).items()}
        context = torch.zeros(1, TEXT_LENGTH, size.text[0], requires_grad=True)
        passes: dict[str, Callable[[], Any]] = {
            "unet": lambda: (
                parts["unet"](torch.zeros(1, 4, latent, latent), torch.zeros(1), context).sample.sum().backward()
            ),
            "vae": lambda: parts["vae"].encode(torch.zeros(1, 3, size.resolution, size.resolution)),
            "image_encoder": lambda: parts["image_encoder"](torch.zeros(1, 3, ENCODER_SIDE, ENCODER_SIDE)),
            "text_encoder": lambda: parts["text_encoder"](torch.zeros(1, TEXT_LENGTH, dtype=torch.long)),
        }
        return {name: _flops(run) for name, run in passes.items()}


def write_data(folder: Path, count: int, size: Size) -> Path:
    """JPEG pictures and the original's list of them; returns the list."""
    folder.mkdir(parents=True)
    texts, draw = captions(), random.Random(0)
    rows = []
    for number in range(count):
        blocks = Image.frombytes("RGB", (8, 8), draw.randbytes(8 * 8 * 3))
        name = f"{number:05d}.jpg"
        blocks.resize(size.picture, Image.Resampling.BICUBIC).save(folder / name, quality=95)
        rows.append({"image_file": name, "text": texts[number % len(texts)]})
    file = folder / "data.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def captions() -> list[str]:
    """All of them, each different."""
    return [" ".join(parts) for parts in itertools.product(*WORDS)]


def _transformer(sizes: tuple[int, int, int]) -> dict[str, int]:
    width, layers, heads = sizes
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _text_config(size: Size, tokenizer: CLIPTokenizer | None) -> CLIPTextConfig:
    start, end = (0, 1) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return CLIPTextConfig(
        **_transformer(size.text),
        vocab_size=size.vocabulary,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
