"""A tiny random model in the SD1.5 layout, saved as a real diffusers folder and loaded by the real code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ipadapter_trainer.base_model import BaseModel, load_base_model
from ipadapter_trainer.config import TrainConfig, make_config
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "teal")
WIDTHS = (32, 32, 64, 64)
CONTEXT, EMBEDS = 32, 24


def write_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """The layout of SD1.5: sixteen cross-attention layers, a VAE of 8 pixels per latent, CLIP text and
    vision.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from ipadapter_trainer.emoji.clip import train_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"a {c} square" for c in COLOURS], folder / "tokenizer", size=300)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
    ).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    shared = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    vision = CLIPVisionConfig(hidden_size=32, image_size=32, patch_size=8, projection_dim=EMBEDS, **shared)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    return folder


def draw_picture(colour: str, size: tuple[int, int] = (80, 64)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).rectangle((20, 14, 56, 50), fill=colour)
    return picture


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """Accelerate keeps the precision of the first Accelerator of a process; every test gets its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-sd15")


@pytest.fixture(scope="session")
def base_model(model_folder: Path) -> BaseModel:
    return load_base_model(model_folder)


@pytest.fixture(scope="session")
def v_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The same weights with the v target."""
    folder = tmp_path_factory.mktemp("v") / "tiny-v"
    folder.mkdir()
    for part in model_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    config = json.loads((model_folder / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return load_base_model(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures with captions beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        draw_picture(colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n")
    return folder


@pytest.fixture
def settings(model_folder: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """A training of seconds."""
    return {
        "base_model": str(model_folder),
        "data": str(pictures),
        "output": str(tmp_path / "run"),
        "resolution": 64,
        "batch_size": 2,
        "steps": 6,
        "workers": 0,
        "log_every": 1,
        "learning_rate": 1e-3,
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> TrainConfig:
    return make_config(settings)


@pytest.fixture
def run_ipadapter() -> Callable[..., subprocess.Popen[str]]:
    """Start the command as a user would, in a process of its own."""

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        code = "from ipadapter_trainer.cli import main; main()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return start
