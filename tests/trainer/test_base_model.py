from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipadapter_core import diffusers_sites
from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


@pytest.fixture
def sdxl_copy(sdxl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl_folder, tmp_path / "copy"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def loaded(model: BaseModel) -> set[str]:
    return set(model._loaded)


def test_every_part_is_loaded_frozen(base_model: BaseModel, sdxl_model: BaseModel) -> None:
    for model in (base_model, sdxl_model):
        for part in (model.unet, model.vae, *model.text_encoders, model.image_encoder):
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())
    assert (base_model.name, base_model.prediction_type) == ("tiny-sd15", "epsilon")
    assert (base_model.text_length, base_model.sample_size, base_model.image_dim) == (16, 64, 24)
    assert (base_model.hidden_dim, base_model.image_tokens) == (32, 17)


def test_families(base_model: BaseModel, sd2_model: BaseModel, sdxl_model: BaseModel) -> None:
    assert [m.family for m in (base_model, sd2_model, sdxl_model)] == ["context-32", "context-48", "context-80"]
    assert [m.prediction_type for m in (base_model, sd2_model, sdxl_model)] == ["epsilon", "v_prediction", "epsilon"]
    assert [m.is_sdxl for m in (base_model, sd2_model, sdxl_model)] == [False, False, True]
    assert [len(m.text_encoders) for m in (base_model, sd2_model, sdxl_model)] == [1, 1, 2]
    assert sdxl_model.tokenizers[1].pad_token == "!" != sdxl_model.tokenizers[0].pad_token
    assert sdxl_model.sites == diffusers_sites(sdxl_model.unet)
    assert (sdxl_model.scaling_factor, sdxl_model.latent_channels, sdxl_model.latent_scale) == (0.13025, 4, 8)


def test_weights_are_read_when_they_are_used(sdxl_folder: Path) -> None:
    model = load_base_model(sdxl_folder)
    assert (model.image_dim, len(model.sites), model.encoder_name.split(" (")[0]) == (24, 17, "CLIP vision encoder")
    model.fingerprint()
    assert not loaded(model)
    before = model.vae.encoder.conv_in.weight
    assert loaded(model) == {"vae"}
    assert model.vae.encoder.conv_in.weight is before
    assert len(model.text_encoders) == 2
    model.release("vae", "image_encoder")
    assert loaded(model) == {"text_encoders"}
    assert model.vae.encoder.conv_in.weight is not before
    torch.testing.assert_close(model.vae.encoder.conv_in.weight, before)
    with pytest.raises(ValueError, match="no part 'text_encoder'"):
        model.release("text_encoder")


def test_modules_without_weights_have_the_shapes_of_the_loaded_ones(sdxl_model: BaseModel) -> None:
    pairs = [
        (sdxl_model.meta_unet(), sdxl_model.unet),
        (sdxl_model.meta_vae(), sdxl_model.vae),
        (sdxl_model.meta_image_encoder(), sdxl_model.image_encoder),
        *zip(sdxl_model.meta_text_encoders(), sdxl_model.text_encoders, strict=True),
    ]
    for meta, real in pairs:
        assert all(p.is_meta for p in meta.parameters())
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    added = sdxl_model.meta_conditions(3)
    text = torch.zeros(3, 16, 80, device="meta")
    latents, timesteps = torch.zeros(3, 4, 8, 8, device="meta"), torch.zeros(3, device="meta")
    assert sdxl_model.meta_unet()(latents, timesteps, text, added_cond_kwargs=added).sample.shape == (3, 4, 8, 8)


def test_workers_get_what_they_need_and_no_weights(sdxl_model: BaseModel) -> None:
    parts = (sdxl_model.tokenizers, sdxl_model.scheduler, sdxl_model.image_processor)
    assert len(pickle.loads(pickle.dumps(parts))) == 3


def test_the_noise_schedule_is_the_models(base_model: BaseModel) -> None:
    config = base_model.scheduler.config
    assert (config["beta_start"], config["beta_schedule"]) == (0.00085, "scaled_linear")
    assert type(base_model.scheduler).__name__ == "DDPMScheduler"
    assert base_model.num_train_timesteps == 1000


def test_the_vae_of_sdxl_stays_in_float32_unless_it_is_the_fixed_one(model_folder: Path, sdxl_copy: Path) -> None:
    assert load_base_model(model_folder, torch.bfloat16).vae.dtype == torch.bfloat16
    model = load_base_model(sdxl_copy, torch.bfloat16)
    assert {model.unet.dtype, model.text_encoders[0].dtype, model.image_encoder.dtype} == {torch.bfloat16}
    assert model.vae.dtype == model.vae_dtype == torch.float32
    edit(sdxl_copy / "vae" / "config.json", force_upcast=False)
    assert load_base_model(sdxl_copy, torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_base_model(sdxl_copy).vae.dtype == torch.float32


def fingerprints(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    model = load_base_model(folder, dtype)
    return model.fingerprint(), model.vae_fingerprint(), model.text_fingerprint(), model.encoder_fingerprint()


def test_the_precision_of_a_run_and_of_the_files_leaves_the_fingerprints_alone(
    sdxl_folder: Path, sdxl_copy: Path, sdxl_model: BaseModel
) -> None:
    before = fingerprints(sdxl_folder)
    assert len(set(before)) == 4
    assert fingerprints(sdxl_folder, torch.bfloat16) == before
    for file in sdxl_copy.rglob("*.safetensors"):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, str(file))
    assert fingerprints(sdxl_copy) == before
    # As diffusers writes it, in shards, and as a pickle.
    shutil.rmtree(sdxl_copy / "unet")
    sdxl_model.unet.save_pretrained(sdxl_copy / "unet", max_shard_size="200KB")
    assert len(list((sdxl_copy / "unet").glob("*.safetensors"))) > 1
    sdxl_model.vae.save_pretrained(sdxl_copy / "vae", safe_serialization=False)
    (sdxl_copy / "vae" / WEIGHTS).unlink()
    assert fingerprints(sdxl_copy) == before
    assert load_base_model(sdxl_copy).vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        (f"unet/{WEIGHTS}", 0),
        (f"vae/{WEIGHTS}", 1),
        ("text_encoder/model.safetensors", 2),
        ("text_encoder_2/model.safetensors", 2),
        ("image_encoder/model.safetensors", 3),
    ],
)
def test_fine_tunes_differ(sdxl_copy: Path, file: str, changed: int) -> None:
    """A LoRA merged into one attention layer is enough."""
    before = fingerprints(sdxl_copy)
    state = load_file(sdxl_copy / file)
    name = next(n for n in sorted(state) if n.endswith(("to_k.weight", "k_proj.weight")))
    state[name] = state[name] + 0.1 * torch.randn(state[name].shape[0], 1) * torch.randn(1, state[name].shape[1])
    save_file(state, str(sdxl_copy / file))
    after = fingerprints(sdxl_copy)
    assert [i for i in range(4) if before[i] != after[i]] == [changed]


def test_the_schedule_the_scale_and_the_tokenizer_count_too(sdxl_copy: Path) -> None:
    before = fingerprints(sdxl_copy)
    edit(sdxl_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    edit(sdxl_copy / "vae" / "config.json", scaling_factor=0.2)
    shutil.copytree(sdxl_copy / "tokenizer", sdxl_copy / "tokenizer_2", dirs_exist_ok=True)
    after = fingerprints(sdxl_copy)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_layers_and_activation_of_clip_count_too(sdxl_copy: Path) -> None:
    """Layers that the config leaves out stay in the file, as in models that skip the last ones."""
    before, model = fingerprints(sdxl_copy), load_base_model(sdxl_copy)
    edit(sdxl_copy / "text_encoder" / "config.json", hidden_act="gelu_new")
    edit(sdxl_copy / "image_encoder" / "config.json", num_hidden_layers=1)
    assert [a != b for a, b in zip(before, fingerprints(sdxl_copy), strict=True)] == [False, False, True, False]
    assert load_base_model(sdxl_copy).encoder_values() != model.encoder_values()


def test_preprocessing_follows_the_encoder(base_model: BaseModel) -> None:
    assert base_model.image_processor.crop_size["height"] == 32
    assert base_model.image_processor.image_mean[0] == pytest.approx(0.48145466)


def test_kinds_that_need_no_image_encoder_can_do_without(copy: Path) -> None:
    shutil.rmtree(copy / "image_encoder")
    model = load_base_model(copy, needs_image_encoder=False)
    for use in (lambda: model.image_encoder, lambda: model.image_dim, model.encoder_fingerprint):
        with pytest.raises(BaseModelError, match=r"no image encoder was given.*Set image_encoder"):
            use()
    with pytest.raises(BaseModelError, match="nowhere: no image encoder there"):
        load_base_model(copy, image_encoder=copy / "nowhere", needs_image_encoder=False)


def test_an_image_encoder_may_be_a_single_file(model_folder: Path, tmp_path: Path) -> None:
    """As in ComfyUI's models/clip_vision: the shapes say which of the published encoders it is."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=16,
        patch_size=14,
        image_size=56,
        projection_dim=48,
        hidden_act="gelu",
    )
    encoder = CLIPVisionModelWithProjection(config).eval()
    encoder.save_pretrained(tmp_path / "vision")
    file = tmp_path / "vision" / "model.safetensors"
    model, folder = (load_base_model(model_folder, image_encoder=p) for p in (file, file.parent))
    assert (model.image_dim, model.hidden_dim, model.image_tokens) == (48, 1280, 17)
    assert model.image_processor.crop_size["height"] == 56
    assert model.encoder_fingerprint() == folder.encoder_fingerprint()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        outputs = [m(pixels, output_hidden_states=True) for m in (model.image_encoder, encoder)]
    assert torch.equal(outputs[0].image_embeds, outputs[1].image_embeds)
    assert torch.equal(outputs[0].hidden_states[-2], outputs[1].hidden_states[-2])


def test_a_single_file_that_is_no_known_image_encoder_is_refused(model_folder: Path) -> None:
    for part, words in (
        (f"unet/{WEIGHTS}", "looks like a UNet, not an image encoder"),
        ("image_encoder/model.safetensors", "32 wide.*1024, 1280, 1664.*Use its folder"),
        ("model_index.json", "model_index.json: a JSON file; expected image encoder weights"),
    ):
        with pytest.raises(BaseModelError, match=words):
            load_base_model(model_folder, image_encoder=model_folder / part)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def scheduler(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **values)


def unet(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "unet" / "config.json", **values)


def index(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **values)


def flux(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    (folder / "unet").rename(folder / "transformer")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("vae"), r"vae is missing \(found: image_encoder, scheduler, text_encoder, tokenizer, unet\)"),
        (remove("tokenizer"), "tokenizer is missing"),
        (remove("image_encoder"), r"no image encoder there.*ViT-H/14"),
        (scheduler(prediction_type="sample"), "prediction type 'sample'.*epsilon or v_prediction"),
        (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEuler"),
        (scheduler(_class_name="EDMEulerScheduler"), "EDMEulerScheduler cannot be trained"),
        (unet(in_channels=9), r"takes 9 channels.*makes 4.*inpainting"),
        (unet(class_embed_type="projection"), "class_embed_type = 'projection': an unCLIP"),
        (unet(encoder_hid_dim_type="text_proj"), "encoder_hid_dim_type = 'text_proj'"),
        (unet(addition_embed_type="image"), "addition_embed_type = 'image'"),
        (unet(addition_embed_type="text_time"), "text_encoder_2 is missing"),
        (unet(cross_attention_dim=48), "make states of 32, the UNet takes 48"),
        (flux, "FLUX.*FluxPipeline.*Use SD1.5, SD2 and SDXL"),
        (lambda f: (f / "unet").rename(f / "transformer"), "a diffusion transformer"),
        (index(_class_name="StableDiffusion3Pipeline"), "Stable Diffusion 3"),
        (index(_class_name="KolorsPipeline"), "Kolors"),
        (index(_class_name="StableDiffusionInpaintPipeline"), "an inpainting model"),
        (index(requires_aesthetics_score=True), "the SDXL refiner"),
        (lambda f: edit(f / "text_encoder" / "config.json", model_type="chatglm"), "type 'chatglm'; expected CLIP"),
        (lambda f: edit(f / "vae" / "config.json", latent_channels=3), "takes 4 channels, the VAE makes 3"),
        (lambda f: edit(f / "vae" / "config.json", latents_mean=[0.0] * 4), "Playground v2.5"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), r"unet/config.json: damaged JSON.*Download it again"),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), r"unet: no weights \(found: config.json\)"),
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").write_text("{"), r"tokenizer_config.json: damaged JSON"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_at_once(copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(copy)
    with pytest.raises(BaseModelError, match=words):
        load_base_model(copy)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("text_encoder"), "the SDXL refiner"),
        (remove("tokenizer_2"), "tokenizer_2 is missing"),
        (unet(projection_class_embeddings_input_dim=48 + 5 * 8), "takes 5 time ids.*a refiner"),
    ],
)
def test_what_is_wrong_with_an_sdxl_folder_is_said(sdxl_copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(sdxl_copy)
    with pytest.raises(BaseModelError, match=words):
        load_base_model(sdxl_copy)


def test_weights_that_are_damaged_later_are_named_when_they_are_used(copy: Path) -> None:
    model = load_base_model(copy)
    (copy / "unet" / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(
        BaseModelError,
        match=rf"{WEIGHTS}: a text file that begins with '12345678'; expected UNet2DConditionModel weights",
    ):
        _ = model.unet
    with pytest.raises(BaseModelError, match="a text file that begins with '12345678'"):
        model.fingerprint()


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nowhere: no such folder"):
        load_base_model(tmp_path / "nowhere")
    with pytest.raises(BaseModelError, match=r"x.safetensors: no such file\. .*a .safetensors checkpoint"):
        load_base_model(tmp_path / "x.safetensors")


def test_a_prediction_type_must_be_the_schedulers(model_folder: Path) -> None:
    assert load_base_model(model_folder, prediction_type="epsilon").prediction_type == "epsilon"
    with pytest.raises(BaseModelError, match=r"'v_prediction', the scheduler of .* has 'epsilon'"):
        load_base_model(model_folder, prediction_type="v_prediction")
    with pytest.raises(BaseModelError, match="'vpred'; expected epsilon or v_prediction"):
        load_base_model(model_folder, prediction_type="vpred")


def test_a_half_precision_folder_is_read(copy: Path) -> None:
    weights = copy / "unet" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = load_base_model(copy)
    assert model.unet.config["sample_size"] == 8
    assert model.fingerprint()


def test_a_hub_folder_is_named_by_its_repository(model_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abc"
    shutil.copytree(model_folder, snapshot)
    assert load_base_model(snapshot).name == "someone/tiny"
