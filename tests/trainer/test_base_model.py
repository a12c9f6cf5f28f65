from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ipadapter_trainer.base_model import BaseModel, load_base_model
from ipadapter_trainer.errors import BaseModelError


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_every_part_is_loaded_frozen(base_model: BaseModel) -> None:
    for part in (base_model.unet, base_model.vae, base_model.text_encoder, base_model.image_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
    assert (base_model.name, base_model.prediction_type) == ("tiny-sd15", "epsilon")
    assert (base_model.text_length, base_model.sample_size, base_model.image_width) == (16, 64, 24)


def test_the_noise_schedule_is_the_models(base_model: BaseModel) -> None:
    config = base_model.scheduler.config
    assert (config["beta_start"], config["beta_schedule"]) == (0.00085, "scaled_linear")
    assert type(base_model.scheduler).__name__ == "DDPMScheduler"


def test_the_vae_stays_in_float32(model_folder: Path, base_model: BaseModel) -> None:
    model = load_base_model(model_folder, torch.bfloat16)
    assert {model.unet.dtype, model.text_encoder.dtype, model.image_encoder.dtype} == {torch.bfloat16}
    assert model.vae.dtype == torch.float32
    assert model.fingerprint() == base_model.fingerprint()


def test_preprocessing_follows_the_encoder(base_model: BaseModel) -> None:
    assert base_model.image_processor.crop_size["height"] == 32
    assert base_model.image_processor.image_mean[0] == pytest.approx(0.48145466)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def scheduler(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("vae"), r"vae is missing \(found: image_encoder, scheduler, text_encoder, tokenizer, unet\)"),
        (remove("image_encoder"), r"no image encoder there.*ViT-H/14"),
        (lambda f: (f / "text_encoder_2").mkdir(), "an SDXL model.*not yet supported by this version"),
        (scheduler(prediction_type="sample"), "prediction type 'sample'.*epsilon or v_prediction"),
        (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEuler"),
        (lambda f: edit(f / "vae" / "config.json", latent_channels=3), "cannot be read as AutoencoderKL"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read as UNet2DConditionModel"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be read as UNet"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(copy)
    with pytest.raises(BaseModelError, match=words):
        load_base_model(copy)


def test_an_inpainting_model_is_refused(copy: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(str(copy / "unet")))
    config["in_channels"] = 9
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(BaseModelError, match=r"takes 9 channels.*makes 4.*inpainting"):
        load_base_model(copy)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nowhere: no such folder"):
        load_base_model(tmp_path / "nowhere")


def test_a_half_precision_folder_is_read(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_base_model(copy).unet.config["sample_size"] == 8
