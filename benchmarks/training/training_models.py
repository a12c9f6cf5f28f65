"""Random base models in the layouts of SD1.5 and SDXL, images with captions, and the work of each part."""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ipadapter_trainer.training.cost import Meter

TEXT_LENGTH = 77
ENCODER_SIDE = 224  # the original resizes every reference image to this
WORDS = (
    ("a red", "a small", "an old", "a shining", "a paper", "a wooden"),
    ("boat", "lamp", "fox", "bicycle", "castle", "teapot", "violin"),
    ("on a table", "in the rain", "under trees", "by the sea", "at night"),
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of the parts; text and vision are (width, layers, heads)."""

    resolution: int  # of the training images, in pixels
    image: tuple[int, int]  # width and height of the files, in pixels
    unet: tuple[int, ...]
    vae: tuple[int, ...]
    text: tuple[int, int, int]
    vision: tuple[int, int, int]
    image_dim: int  # of the image embedding
    vocabulary: int
    text_2: tuple[int, int, int] | None = None  # SDXL's second text encoder

    @property
    def cross_attention_dim(self) -> int:
        """Of the text states that the UNet reads."""
        return self.text[0] + (0 if self.text_2 is None else self.text_2[0])


# tiny: a fifth of the widths and a quarter of the side, with depths that keep each part's share of the arithmetic.
SIZES: Mapping[str, Size] = {
    "tiny": Size(128, (192, 160), (64, 128, 256, 256), (24, 48, 96, 96), (160, 1, 4), (160, 4, 4), 160, 512),
    "sd15": Size(
        512, (1024, 768), (320, 640, 1280, 1280), (128, 256, 512, 512), (768, 12, 12), (1280, 32, 16), 1024, 49408
    ),
    # With ViT-H/14, which most published SDXL adapters read.
    "sdxl": Size(
        1024, (1280, 1152), (320, 640, 1280), (128, 256, 512, 512), (768, 12, 12), (1280, 32, 16), 1024, 49408,
        text_2=(1280, 32, 20),
    ),
    "tiny-sdxl": Size(
        128, (192, 160), (64, 128, 256), (24, 48, 96, 96), (160, 1, 4), (160, 4, 4), 160, 512, text_2=(96, 1, 4)
    ),
}  # fmt: skip
HEAD_WIDTH, TIME_ID_WIDTH, TIME_IDS = 64, 256, 6  # SDXL's


def write_base_model(folder: Path, size: Size, device: str) -> Path:
    """A diffusers folder with an image_encoder inside; the weights are drawn on `device`. For a GPU they are in float16
    on the disk, half as much to write and to read.
    """
    tokenizers = [write_tokenizer(folder / name) for name in tokenizer_names(size)]
    if len(tokenizers[0]) > size.vocabulary:
        raise ValueError(f"the tokenizer has {len(tokenizers[0])} tokens, the text encoder {size.vocabulary}")
    torch.manual_seed(0)
    for name, make in part_makers(size, tokenizers[0]).items():
        with torch.device(device):
            part = make()
        if device == "cuda":
            part.half()
        part.save_pretrained(folder / name)
        del part
    if device == "cuda":
        torch.cuda.empty_cache()  # the contenders have the GPU to themselves
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


def tokenizer_names(size: Size) -> tuple[str, ...]:
    """The tokenizers' folders."""
    return ("tokenizer",) if size.text_2 is None else ("tokenizer", "tokenizer_2")


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, for the words of the captions, with its length of 77."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tools.emoji.clip import train_tokenizer  # noqa: PLC0415 - no installed package

    train_tokenizer(captions(), folder, size=400)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def part_makers(size: Size, tokenizer: CLIPTokenizer | None = None) -> dict[str, Callable[[], Any]]:
    """The parts of a diffusers folder that have weights, by the names of their folders."""
    blocks = len(size.vae)
    groups = 32 if size.unet[0] % 32 == 0 and size.vae[0] % 32 == 0 else 8
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**_unet_config(size, groups)),
        "vae": lambda: AutoencoderKL.from_config(_vae_config(size, blocks, groups)),
        "text_encoder": lambda: CLIPTextModel(_text_config(size, size.text, tokenizer)),
        "image_encoder": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **_transformer(size.vision),
                hidden_act="gelu",
                image_size=ENCODER_SIDE,
                patch_size=14,
                projection_dim=size.image_dim,
            )
        ),
    }
    second = size.text_2
    if second is not None:
        makers["text_encoder_2"] = lambda: CLIPTextModelWithProjection(
            _text_config(size, second, tokenizer, hidden_act="gelu", projection_dim=second[0])
        )
    return makers


def _vae_config(size: Size, blocks: int, groups: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": size.vae,
        "layers_per_block": 2,
        "norm_num_groups": groups,
        "sample_size": size.resolution,
    }
    return config if size.text_2 is None else {**config, "scaling_factor": 0.13025}


def _unet_config(size: Size, groups: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sample_size": size.resolution // 8,
        "block_out_channels": size.unet,
        "cross_attention_dim": size.cross_attention_dim,
        "attention_head_dim": 8,
        "norm_num_groups": groups,
    }
    if size.text_2 is None:
        return config
    return {
        **config,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": tuple(width // HEAD_WIDTH for width in size.unet),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": size.text_2[0] + TIME_IDS * TIME_ID_WIDTH,
    }


@functools.cache
def part_flops(size: Size) -> Mapping[str, int]:
    """Floating-point operations of each part for one image: UNet forward and backward, the others forward.

    The UNet's weights are frozen, its context is not, as for an adapter. Nothing is computed: all tensors are meta.
    """
    latent = size.resolution // 8
    with torch.device("meta"):
        parts = {name: make().requires_grad_(False) for name, make in part_makers(size).items()}
        context = torch.zeros(1, TEXT_LENGTH, size.cross_attention_dim, requires_grad=True)
        added = size.text_2 and {"text_embeds": torch.zeros(1, size.text_2[0]), "time_ids": torch.zeros(1, TIME_IDS)}
        text = torch.zeros(1, TEXT_LENGTH, dtype=torch.long)
        passes: dict[str, Callable[[], Any]] = {
            "unet": lambda: (
                parts["unet"](torch.zeros(1, 4, latent, latent), torch.zeros(1), context, added_cond_kwargs=added)
                .sample.sum()
                .backward()
            ),
            "vae": lambda: parts["vae"].encode(torch.zeros(1, 3, size.resolution, size.resolution)),
            "image_encoder": lambda: parts["image_encoder"](torch.zeros(1, 3, ENCODER_SIDE, ENCODER_SIDE)),
            "text_encoder": lambda: parts["text_encoder"](text),
        }
        if size.text_2 is not None:
            passes["text_encoder_2"] = lambda: parts["text_encoder_2"](text)
        return {name: _flops(run) for name, run in passes.items()}


def write_data(folder: Path, count: int, size: Size) -> Path:
    """JPEG images and the original's list of them; returns the list."""
    folder.mkdir(parents=True)
    texts, draw = captions(), random.Random(0)
    pixels = [draw.randbytes(8 * 8 * 3) for _ in range(count)]
    names = [f"{number:05d}.jpg" for number in range(count)]

    def write(name: str, values: bytes) -> None:
        blocks = Image.frombytes("RGB", (8, 8), values)
        blocks.resize(size.image, Image.Resampling.BICUBIC).save(folder / name, quality=95)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, names, pixels))
    rows = [{"image_file": name, "text": texts[number % len(texts)]} for number, name in enumerate(names)]
    file = folder / "data.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def captions() -> list[str]:
    """All of them, each different."""
    return [" ".join(parts) for parts in itertools.product(*WORDS)]


def _transformer(sizes: tuple[int, int, int]) -> dict[str, Any]:
    width, layers, heads = sizes
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _text_config(
    size: Size, widths: tuple[int, int, int], tokenizer: CLIPTokenizer | None, **more: Any
) -> CLIPTextConfig:
    start: Any = 0 if tokenizer is None else tokenizer.bos_token_id
    end: Any = 1 if tokenizer is None else tokenizer.eos_token_id
    return CLIPTextConfig(
        **_transformer(widths),
        **more,
        vocab_size=size.vocabulary,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )


def _flops(run: Callable[[], Any]) -> int:
    with Meter() as meter:  # PyTorch's FlopCounterMode gives the same, in several times the time
        run()
    return meter.flops
