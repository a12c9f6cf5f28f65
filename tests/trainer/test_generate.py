from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from ipadapter_core import AdapterError, IPAdapter, init_from_unet, new_spec, save_adapter
from ipadapter_trainer.errors import TrainerError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.models.generate import decode, generate, initial_latents
from ipadapter_trainer.models.image_features import encode_images
from ipadapter_trainer.settings.kinds import TRAIN_KINDS

from .tiny_models import adapter_of

EMBEDS = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red square", "a blue square", ""]
MODELS = ("base_model", "sd2_model", "sdxl_model")


def loadable_adapter(model: BaseModel, kind: str) -> IPAdapter:
    """diffusers' loader knows heads of 64 only, more than the tiny models are wide."""
    if kind != "plus":
        return adapter_of(model, kind)
    torch.manual_seed(0)
    widths, context = [site.dim for site in model.sites], model.sites[0].cross_attention_dim
    adapter = IPAdapter(new_spec("plus", widths, context, image_dim=model.hidden_dim, resampler_dim=64))
    init_from_unet(adapter.layers, model.unet)
    return adapter.eval()


def prompt_for(model: BaseModel, adapter: IPAdapter, count: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (count, 40, 48, 3), generator=generator, dtype=torch.uint8).numpy()
    images = [Image.fromarray(rows) for rows in noise]
    faces = torch.randn(count, 512, generator=generator) if adapter.spec.face_dim else None
    return encode_images(model, adapter.spec, images, faces)


@pytest.fixture(scope="module")
def adapter(base_model: BaseModel) -> IPAdapter:
    return adapter_of(base_model, "base")


def test_shape_range_and_determinism(base_model: BaseModel, adapter: IPAdapter) -> None:
    first, again = (
        generate(base_model, adapter, prompts=PROMPTS, image_features=[EMBEDS], steps=3, seed=1) for _ in range(2)
    )
    assert first.shape == (3, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert generate(base_model, None, prompts=[""], image_features=None, steps=1, size=32).shape[-1] == 32
    assert generate(base_model, None, prompts=[""], image_features=None, steps=1, size=(32, 48)).shape[-2:] == (32, 48)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", list(TRAIN_KINDS))
def test_every_kind_draws_with_every_family(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    model: BaseModel = request.getfixturevalue(name)
    adapter = adapter_of(model, kind)
    features = prompt_for(model, adapter)
    options: dict[str, Any] = {"prompts": ["a red square"], "steps": 1}
    with_image = generate(model, adapter, image_features=features, **options)
    plain = generate(model, None, image_features=None, **{**options, "prompts": ["a red square"] * 3})
    assert with_image.shape == (3, 3, 64, 64)
    assert all((with_image[i] - plain[i]).abs().max() > 1e-5 for i in range(3))
    assert torch.equal(generate(model, adapter, image_features=features, weight=0, **options), plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("name", "kind"), [("base_model", "base"), ("sdxl_model", "plus"), ("sd2_model", "faceid")])
def test_a_batch_is_its_images_one_by_one(
    name: str, kind: str, guidance: float, request: pytest.FixtureRequest
) -> None:
    model: BaseModel = request.getfixturevalue(name)
    adapter = adapter_of(model, kind)
    features = prompt_for(model, adapter)
    weights = [0.0, 0.5, 1.0]
    options: dict[str, Any] = {"steps": 2, "guidance": guidance}
    batch = generate(model, adapter, prompts=PROMPTS, image_features=features, weight=weights, **options)
    for i, (prompt, weight) in enumerate(zip(PROMPTS, weights, strict=True)):
        rows = [feature[i : i + 1] for feature in features]
        alone = generate(model, adapter, prompts=[prompt], image_features=rows, weight=weight, seed=i, **options)
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_weight_zero_and_no_features_are_no_adapter(base_model: BaseModel, adapter: IPAdapter) -> None:
    plain = generate(base_model, None, prompts=PROMPTS, image_features=None, steps=2)
    zero = generate(base_model, adapter, prompts=PROMPTS, image_features=[EMBEDS], weight=0, steps=2)
    without = generate(base_model, adapter, prompts=PROMPTS, image_features=None, steps=2)
    with_image = generate(base_model, adapter, prompts=PROMPTS, image_features=[EMBEDS], steps=2)
    assert torch.equal(zero, plain)
    assert torch.equal(without, plain)
    assert not torch.equal(with_image, plain)


def test_the_negative_image_is_that_of_a_dropped_one(base_model: BaseModel) -> None:
    """With the dropped image as the prompt, and no text, guidance changes nothing."""
    for kind in ("base", "plus", "faceid-plusv2"):
        adapter = adapter_of(base_model, kind)
        features = [torch.zeros(1, 512)] if adapter.spec.face_dim else []
        if kind == "base":
            features.append(torch.zeros(1, 24))
        else:
            pixels = torch.zeros(1, 3, 32, 32)
            features.append(base_model.image_encoder(pixels, output_hidden_states=True).hidden_states[-2])
        images = [
            generate(base_model, adapter, prompts=[""], image_features=features, steps=2, guidance=g)
            for g in (1.0, 5.0)
        ]
        torch.testing.assert_close(*images, atol=1e-4, rtol=1e-4)


def test_several_faces_bring_the_tokens_of_each(base_model: BaseModel) -> None:
    adapter = adapter_of(base_model, "portrait")
    faces = torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(0))
    assert adapter.encode(faces).shape[1] == 3 * 16
    assert generate(base_model, adapter, prompts=[""], image_features=[faces], steps=1).shape == (1, 3, 64, 64)


def test_the_lora_follows_the_weight(base_model: BaseModel) -> None:
    """With keys and values of zero the LoRA is all that acts."""
    adapter = adapter_of(base_model, "faceid")
    for parameter in adapter.layers.parameters():
        torch.nn.init.zeros_(parameter)
    options: dict[str, Any] = {"prompts": ["a red square"], "image_features": [torch.ones(1, 512)], "steps": 1}
    row = generate(base_model, adapter, weight=[0, 0.5, 1], **options)
    torch.testing.assert_close(row[:1], generate(base_model, None, **options), atol=1e-5, rtol=1e-5)
    alone = generate(base_model, adapter, weight=0.5, seed=1, **options)
    torch.testing.assert_close(row[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, generate(base_model, None, seed=1, **options), atol=1e-4)


def test_half_precision(sdxl_folder: Path) -> None:
    model = load_base_model(sdxl_folder, torch.bfloat16)
    adapter = adapter_of(model, "faceid-plus")
    image = generate(model, adapter, prompts=[""], image_features=prompt_for(model, adapter, 1), steps=1)
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert next(adapter.lora.parameters()).dtype == torch.float32  # type: ignore[union-attr]


def pipeline_of(model: BaseModel) -> Any:
    shared = {"vae": model.vae, "unet": model.unet, "tokenizer": model.tokenizer}
    shared["text_encoder"] = model.text_encoders[0]
    scheduler = DDIMScheduler.from_config(
        model.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    encoder = {"image_encoder": model.image_encoder, "feature_extractor": model.image_processor}
    if model.is_sdxl:
        second = {"text_encoder_2": model.text_encoders[1], "tokenizer_2": model.tokenizers[1]}
        pipeline = StableDiffusionXLPipeline(**shared, **second, scheduler=scheduler, add_watermarker=False, **encoder)
    else:
        extra = {"safety_checker": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**shared, scheduler=scheduler, **extra, **encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", [None, "base", "plus"])
@pytest.mark.parametrize("name", MODELS)
def test_diffusers_pipeline_makes_the_same_image(
    name: str, kind: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two texts, guidance, an image and its negative, another height than width: our short loop against theirs."""
    model: BaseModel = request.getfixturevalue(name)
    adapter = None if kind is None else loadable_adapter(model, kind)
    pipeline = pipeline_of(load_base_model(Path(model.unet.config["_name_or_path"]).parent))
    features, image = None, {}
    if adapter is not None:
        save_adapter(tmp_path / "a.safetensors", adapter)
        pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name="a.safetensors", image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(0.7)
        features = prompt_for(model, adapter, 1)
        none = encode_none(model, adapter)
        image = {"ip_adapter_image_embeds": [torch.stack([none, features[0]])]}
    theirs = pipeline(
        "a red square",
        negative_prompt="blue",
        latents=initial_latents(model, 1, 5, (64, 80)),
        height=64,
        width=80,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
        **image,
    ).images
    ours = generate(
        model,
        adapter,
        prompts=["a red square"],
        negative_prompt="blue",
        image_features=features,
        weight=0.7,
        steps=2,
        guidance=3.0,
        seed=5,
        size=(64, 80),
    )
    torch.testing.assert_close(ours / 2 + 0.5, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def encode_none(model: BaseModel, adapter: IPAdapter) -> Tensor:
    if adapter.spec.kind == "base":
        return torch.zeros(1, 24)
    return model.image_encoder(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[-2]


def test_v_prediction_differs_from_epsilon(base_model: BaseModel, v_model: BaseModel) -> None:
    images = [generate(m, None, prompts=[""], image_features=None, steps=2) for m in (base_model, v_model)]
    assert not torch.equal(*images)


def test_another_noise_schedule_can_be_given(v_model: BaseModel) -> None:
    rescaled = type(v_model.scheduler).from_config(v_model.scheduler.config, rescale_betas_zero_snr=True)
    options: dict[str, Any] = {"prompts": [""], "image_features": None, "steps": 2}
    images = [generate(v_model, None, **options), generate(v_model, None, scheduler=rescaled, **options)]
    assert images[1].isfinite().all()
    assert not torch.equal(*images)


def test_one_prompt_serves_many_weights(base_model: BaseModel, adapter: IPAdapter) -> None:
    row = generate(base_model, adapter, prompts=[""], image_features=[EMBEDS[:1]], weight=[0, 0.5, 1], steps=1)
    assert len(row) == 3


def test_decoding_in_parts_is_decoding(base_model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = initial_latents(base_model, 3, 0, 64)
    whole = decode(base_model, latents)
    monkeypatch.setattr("ipadapter_trainer.models.generate.DECODE_ROWS", 2)
    torch.testing.assert_close(decode(base_model, latents), whole, atol=1e-5, rtol=1e-5)


def test_seeds_and_texts_may_be_given_row_by_row(sdxl_model: BaseModel) -> None:
    batch = generate(sdxl_model, None, prompts=PROMPTS, image_features=None, seed=4, steps=1)
    states = encode_prompts(sdxl_model, PROMPTS[::-1])
    negative = encode_prompts(sdxl_model, [""])
    again = generate(
        sdxl_model, None, prompts=states, negative_prompt=negative, image_features=None, seed=[6, 5, 4], steps=1
    )
    torch.testing.assert_close(again, batch.flip(0), atol=1e-5, rtol=1e-5)
    with pytest.raises(TrainerError, match="seed has 2 rows in a batch of 3"):
        generate(sdxl_model, None, prompts=states, image_features=None, seed=[1, 2])


def test_what_does_not_fit_is_refused(base_model: BaseModel, sdxl_model: BaseModel, adapter: IPAdapter) -> None:
    with pytest.raises(TrainerError, match="prompts has 2 rows in a batch of 3"):
        generate(base_model, adapter, prompts=["", ""], image_features=[EMBEDS])
    with pytest.raises(AdapterError, match="7 wide"):
        generate(base_model, adapter, prompts=[""], image_features=[torch.zeros(1, 7)])
    with pytest.raises(AdapterError, match="takes 1 features"):
        generate(base_model, adapter, prompts=[""], image_features=[EMBEDS[:1], EMBEDS[:1]])
    with pytest.raises(AdapterError, match="context 32"):
        generate(sdxl_model, adapter, prompts=[""], image_features=[EMBEDS[:1]])
    for size in (60, (64, 60), (0, 64)):
        with pytest.raises(TrainerError, match="multiple of 8"):
            generate(base_model, None, prompts=[""], image_features=None, size=size)


def test_images_of_any_mode_are_encoded(base_model: BaseModel, adapter: IPAdapter) -> None:
    images = [Image.new(mode, (50, 40)) for mode in ("RGB", "L", "RGBA", "P", "CMYK")]
    (embeds,) = encode_images(base_model, adapter.spec, images)
    assert embeds.shape == (5, 24)
