"""Tiny random models in the layouts of SD1.5, SD2 and SDXL, saved as real diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ipadapter_core import IPAdapter
    from ipadapter_trainer.models.base_model import BaseModel

COLOURS = ("red", "green", "blue", "orange", "purple", "teal")
EMBEDS = 24  # channels of image_embeds
LENGTH = 16  # tokens of a prompt

# What makes the UNet of each family what it is, at a tiny width.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 2},
    "sd2": {
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": 48,
        "attention_head_dim": (2, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
}
# The same with two levels of one layer, so 4 cross-attention layers in SD1.5 and SD2 and 8 in SDXL: for tests that take
# many steps.
_SMALL: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd15": UNETS["sd15"] | _SMALL,
    "sd2": UNETS["sd2"] | _SMALL | {"attention_head_dim": (2, 2)},
    "sdxl": UNETS["sdxl"]
    | {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
    },
}
TEXT_WIDTHS = {"sd15": (32,), "sd2": (48,), "sdxl": (32, 48)}


def write_model(folder: Path, family: str = "sd15", prediction_type: str | None = None, small: bool = False) -> Path:
    """A model of `family` and, inside, an image encoder. SD2 predicts v unless told otherwise, as SD2-768 does. `small`
    is one with a UNet of `SMALL_UNETS`.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = (SMALL_UNETS if small else UNETS)[family]
    UNet2DConditionModel(sample_size=8, norm_num_groups=8, **unet).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    ).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type or ("v_prediction" if family == "sd2" else "epsilon"),
    ).save_pretrained(folder / "scheduler")
    write_text_encoders(folder, family)
    vision = CLIPVisionConfig(
        hidden_size=32, image_size=32, patch_size=8, projection_dim=EMBEDS, **_layers(hidden_act="gelu")
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def write_text_encoders(folder: Path, family: str) -> None:
    """One text encoder and tokenizer, or SDXL's two, of which the second pads with "!"."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tools.emoji.clip import train_tokenizer

    texts = [f"a {c} square" for c in COLOURS]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", size=300)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    for kind, width, suffix in zip(kinds, TEXT_WIDTHS[family], ("", "_2"), strict=False):
        if suffix:
            tokenizer.pad_token = "!"
            tokenizer.save_pretrained(str(folder / f"tokenizer{suffix}"))
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=width,
            # CLIP's own text encoder, and OpenCLIP's.
            **_layers(hidden_act="quick_gelu" if width == 32 else "gelu"),
        )
        kind(config).save_pretrained(folder / f"text_encoder{suffix}")


def _layers(hidden_act: str) -> dict[str, Any]:
    return {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act}


def adapter_of(model: BaseModel, kind: str) -> IPAdapter:
    """A random adapter whose LoRA does something."""
    from ipadapter_trainer.settings.kinds import TRAIN_KINDS
    from ipadapter_trainer.training.new_adapter import new_adapter

    torch.manual_seed(0)
    adapter = new_adapter(model, TRAIN_KINDS[kind]).eval()
    if adapter.lora is not None:
        for parameter in adapter.lora.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return adapter
