"""The published base models as folders of configs without weights: all that a dry run reads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPVisionConfig

from tools.emoji.clip import train_tokenizer

_TEXT_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_TEXT_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
_TEXT_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
_SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": _SDXL_UNET,
}
_TEXTS = {"sd15": (_TEXT_L,), "sd2": (_TEXT_H,), "sdxl": (_TEXT_L, {**_TEXT_G, "projection_dim": 1280})}


def write_published_base(folder: Path, family: str) -> Path:
    """SD1.5, SD2.1 (768, v-prediction) or SDXL with CLIP ViT-H/14: their shapes, and a tokenizer that stands in."""
    sdxl = family == "sdxl"
    with torch.device("meta"):
        UNet2DConditionModel(**_UNETS[family]).save_config(folder / "unet")
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=1024 if sdxl else 512,
            scaling_factor=0.13025 if sdxl else 0.18215,
        ).save_config(folder / "vae")
    DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    ).save_pretrained(folder / "scheduler")
    for suffix, sizes in zip(("", "_2"), _TEXTS[family], strict=False):
        tokenizer = train_tokenizer(["a cat"], folder / f"tokenizer{suffix}", size=300)
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        architecture = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        CLIPTextConfig(**sizes, architectures=[architecture]).save_pretrained(folder / f"text_encoder{suffix}")
    CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
        architectures=["CLIPVisionModelWithProjection"],
    ).save_pretrained(folder / "image_encoder")
    for part in folder.iterdir():
        if "tokenizer" not in part.name and part.name != "scheduler":
            name = "diffusion_pytorch_model" if part.name in ("unet", "vae") else "model"
            save_file({"nothing": torch.zeros(1)}, str(part / f"{name}.safetensors"))
    return folder
