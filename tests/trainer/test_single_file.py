"""Checkpoints in the original layout, written by `ldm.py`, against the folders that they were written from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.models.single_file import hub_configs

from .ldm import single_file_state, write_single_file

FAMILIES = ("sd15", "sd2", "sdxl")
FLAG = torch.zeros(0)


class Checkpoint(NamedTuple):
    family: str
    folder: Path
    file: Path


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    name = {"sd15": "model_folder", "sd2": "sd2_folder", "sdxl": "sdxl_folder"}[request.param]
    folder: Path = request.getfixturevalue(name)
    file = tmp_path_factory.mktemp("files") / f"my-{request.param}.safetensors"
    return Checkpoint(request.param, folder, write_single_file(folder, file, request.param))


@pytest.fixture
def sd15_state(model_folder: Path) -> dict[str, Tensor]:
    return single_file_state(model_folder, "sd15")


def save(state: dict[str, Tensor], folder: Path, **metadata: str) -> Path:
    save_file(state, str(folder / "x.safetensors"), metadata=metadata or None)
    return folder / "x.safetensors"


def configs_of(folder: Path, target: Path) -> Path:
    """The folder without its weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@torch.no_grad()
def outputs(model: BaseModel) -> list[Tensor]:
    """What every part says."""
    generator = torch.Generator().manual_seed(0)
    latents, pixels = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(1, 3, 64, 64, generator=generator)
    text = encode_prompts(model, ["a red square", ""])
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": torch.full((2, 6), 64.0)}
    noise = model.unet(latents, torch.tensor([10, 900]), text.states, added_cond_kwargs=added).sample
    moments = model.vae.encode(pixels).latent_dist.parameters
    return [text.states, *([] if text.pooled is None else [text.pooled]), noise, moments, model.vae.decode(latents)[0]]


def test_a_file_says_what_its_folder_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    configs = configs_of(checkpoint.folder, tmp_path / "configs")
    single, folder = (
        load_base_model(checkpoint.file, base_config=configs, needs_image_encoder=False),
        load_base_model(checkpoint.folder),
    )
    assert single._loaded == {}
    ours, theirs = outputs(single), outputs(folder)
    assert len(ours) == len(theirs) == (5 if checkpoint.family == "sdxl" else 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert single.name == f"my-{checkpoint.family}"
    assert (single.prediction_type, single.family, single.text_length, single.sample_size) == (
        folder.prediction_type,
        folder.family,
        folder.text_length,
        folder.sample_size,
    )
    for part in (single.unet, single.vae, *single.text_encoders):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_a_file_has_the_fingerprints_of_its_folder(checkpoint: Checkpoint) -> None:
    single, folder = load_base_model(checkpoint.file, base_config=checkpoint.folder), load_base_model(checkpoint.folder)
    for name in ("fingerprint", "vae_fingerprint", "encoder_fingerprint"):
        assert getattr(single, name)() == getattr(folder, name)()
    same_text = single.text_fingerprint() == folder.text_fingerprint()
    assert same_text == (checkpoint.family == "sd15")


def test_precision(checkpoint: Checkpoint) -> None:
    model = load_base_model(checkpoint.file, torch.bfloat16, base_config=checkpoint.folder)
    assert {model.unet.dtype, *(t.dtype for t in model.text_encoders)} == {torch.bfloat16}
    assert model.vae.dtype == (torch.float32 if checkpoint.family == "sdxl" else torch.bfloat16)


def test_names_that_merges_lost_are_understood(
    sd15_state: dict[str, Tensor], model_folder: Path, base_model: BaseModel, tmp_path: Path
) -> None:
    state = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in sd15_state.items()}
    model = load_base_model(save(state, tmp_path), base_config=model_folder)
    states = [encode_prompts(m, ["a red square"]).states for m in (model, base_model)]
    assert torch.equal(*states)


def test_lora_tensors_beside_a_checkpoint_are_ignored(
    sd15_state: dict[str, Tensor], model_folder: Path, base_model: BaseModel, tmp_path: Path
) -> None:
    lora = {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(2, 2)}
    model = load_base_model(save({**sd15_state, **lora}, tmp_path), base_config=model_folder)
    for name in ("fingerprint", "vae_fingerprint", "text_fingerprint"):
        assert getattr(model, name)() == getattr(base_model, name)()
    for one, other in zip(outputs(model), outputs(base_model), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tensors", "metadata", "asked", "expected"),
    [
        ({}, {}, None, "epsilon"),  # the config's
        ({}, {}, "v_prediction", "v_prediction"),
        ({"v_pred": FLAG}, {}, None, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ({"v_pred": FLAG}, {}, "v_prediction", "v_prediction"),
    ],
)
def test_what_the_file_says_wins_over_the_setting_over_the_config(
    sdxl_folder: Path,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    asked: str | None,
    expected: str,
) -> None:
    file = write_single_file(sdxl_folder, tmp_path / "x.safetensors", "sdxl", tensors, **metadata)
    model = load_base_model(file, base_config=sdxl_folder, prediction_type=asked)
    assert model.prediction_type == expected
    assert not model.scheduler.config["rescale_betas_zero_snr"]


def test_a_contradiction_is_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(sdxl_folder, tmp_path / "x.safetensors", "sdxl", {"v_pred": FLAG})
    with pytest.raises(BaseModelError, match=r"'epsilon', .*x.safetensors has 'v_prediction'"):
        load_base_model(file, base_config=sdxl_folder, prediction_type="epsilon")


def test_zero_terminal_snr_is_read_from_the_file(sdxl_folder: Path, tmp_path: Path) -> None:
    flags = {"v_pred": FLAG, "ztsnr": FLAG}
    model = load_base_model(
        write_single_file(sdxl_folder, tmp_path / "x.safetensors", "sdxl", flags), base_config=sdxl_folder
    )
    assert model.scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize(("spread", "warned"), [(0.0, True), (1.0, False)])
def test_sd2_warns_when_the_weights_look_like_the_other_target(
    sd2_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spread: float, warned: bool
) -> None:
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    file = write_single_file(sd2_folder, tmp_path / "x.safetensors", "sd2", {name: spread * torch.linspace(-1, 1, 32)})
    with caplog.at_level(logging.WARNING):
        assert load_base_model(file, base_config=sd2_folder).prediction_type == "v_prediction"
    assert ("the config has v_prediction, the weights look like epsilon" in caplog.text) == warned
    caplog.clear()
    load_base_model(file, base_config=sd2_folder, prediction_type="v_prediction")
    assert not caplog.text


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_x.lora_up.weight": FLAG}, "looks like a LoRA"),
        ({"image_proj.latents": FLAG, "ip_adapter.1.to_k_ip.weight": FLAG}, "looks like an IP-Adapter"),
        ({"encoder.conv_in.weight": FLAG, "decoder.conv_in.weight": FLAG}, "looks like a VAE"),
        ({"control_model.input_hint_block.0.weight": FLAG}, "looks like a ControlNet"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": FLAG}, "a Stable Diffusion 3 model"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": FLAG}, "a FLUX model"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": FLAG}, "looks like a UNet"),
        ({"vision_model.embeddings.class_embedding": FLAG}, "an image encoder"),
        ({"x.weight": FLAG}, "something unknown"),
        ({}, r"an empty file"),
    ],
)
def test_other_files_are_refused_by_name(
    tmp_path: Path, model_folder: Path, tensors: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(BaseModelError, match=f"{words}.*Use a whole SD1.5, SD2 and SDXL checkpoint"):
        load_base_model(save(tensors, tmp_path), base_config=model_folder)


def test_other_models_are_refused_by_name(
    sd15_state: dict[str, Tensor], sdxl_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    xl = single_file_state(sdxl_folder, "sdxl")
    refiner = {k.replace("embedders.1", "embedders.0"): v for k, v in xl.items() if "embedders.0" not in k}
    cases = [
        ({**sd15_state, conv_in: torch.zeros(32, 9, 3, 3)}, "takes 9 channels: an inpainting model"),
        ({**sd15_state, "edm_mean": FLAG}, "a Playground v2.5 model"),
        ({**sd15_state, "control_model.input_hint_block.0.weight": FLAG}, "a ControlNet"),
        (refiner, "the SDXL refiner"),
        ({k: v for k, v in sd15_state.items() if not k.startswith("first_stage")}, "has a UNet but no VAE"),
        ({k: v for k, v in sd15_state.items() if not k.startswith("cond_stage")}, "but no text encoder"),
    ]
    for state, words in cases:
        with pytest.raises(BaseModelError, match=words):
            load_base_model(save(state, tmp_path), base_config=model_folder)


def test_a_config_of_another_family_is_refused(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> None:
    other = request.getfixturevalue("sd2_folder" if checkpoint.family != "sd2" else "model_folder")
    with pytest.raises(BaseModelError, match=r"model \(context \d+\), but base_config .* of the same family"):
        load_base_model(checkpoint.file, base_config=other)


def test_configs_beside_a_folder_are_refused(model_folder: Path, sd2_folder: Path) -> None:
    with pytest.raises(BaseModelError, match=rf"base_config={sd2_folder} is .*, but {model_folder} is a folder"):
        load_base_model(model_folder, base_config=sd2_folder)


def test_an_incomplete_file_is_named_when_it_is_used(
    sd15_state: dict[str, Tensor], model_folder: Path, tmp_path: Path
) -> None:
    lost = {"model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.bias"}
    lost.add("cond_stage_model.transformer.text_model.final_layer_norm.bias")
    file = save({k: v for k, v in sd15_state.items() if k not in lost}, tmp_path)
    model = load_base_model(file, base_config=model_folder)
    for part in ("unet", "vae", "text_encoder"):
        with pytest.raises(BaseModelError, match=f"x.safetensors: its {part} is incomplete"):
            getattr(model, {"text_encoder": "text_encoders"}.get(part, part))


def test_a_truncated_file_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(checkpoint.file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="truncated: it has"):
        load_base_model(tmp_path / "x.safetensors", base_config=checkpoint.folder)


def test_another_width_is_named_when_it_is_used(
    sd15_state: dict[str, Tensor], model_folder: Path, tmp_path: Path
) -> None:
    configs = configs_of(model_folder, tmp_path / "configs")
    config = json.loads((configs / "unet" / "config.json").read_text())
    config["block_out_channels"] = [32, 32, 64, 32]
    (configs / "unet" / "config.json").write_text(json.dumps(config))
    model = load_base_model(save(sd15_state, tmp_path), base_config=configs, needs_image_encoder=False)
    with pytest.raises(BaseModelError, match="unet does not fit the config"):
        _ = model.unet


def test_configs_come_from_the_hubs_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = {
        "sd15": "stable-diffusion-v1-5--stable-diffusion-v1-5",
        "sd2": "sd2-community--stable-diffusion-2-1",
        "sdxl": "stabilityai--stable-diffusion-xl-base-1.0",
    }[checkpoint.family]
    cache = tmp_path / f"models--{repository}"
    configs_of(checkpoint.folder, cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_base_model(checkpoint.file, needs_image_encoder=False)
    assert model.name == f"my-{checkpoint.family}"
    expected = load_file(checkpoint.folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(model.unet.conv_in.weight, expected)


def test_without_configs_the_message_says_what_to_set(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"could not be downloaded.*Set base_config to a diffusers folder"):
        load_base_model(checkpoint.file)
    with pytest.raises(BaseModelError, match=r"an? SDXL checkpoint needs the configs"):
        hub_configs("sdxl", checkpoint.file)
