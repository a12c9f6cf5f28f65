"""Text and sizes as diffusers' own pipelines give them to the UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ipadapter_trainer.data.preprocess import tokenize
from ipadapter_trainer.errors import TrainerError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import (
    TextStates,
    added_conditions,
    encode_prompts,
    encode_tokens,
    time_ids,
)

PROMPTS = ["a red square", "", "a blue square and a green square and a teal square", "a red square"]


def pipeline_of(model: BaseModel) -> Any:
    shared = {"vae": model.vae, "unet": model.unet, "scheduler": model.scheduler}
    first = {"text_encoder": model.text_encoders[0], "tokenizer": model.tokenizer}
    if model.is_sdxl:
        second = {"text_encoder_2": model.text_encoders[1], "tokenizer_2": model.tokenizers[1]}
        return StableDiffusionXLPipeline(**shared, **first, **second, add_watermarker=False)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**shared, **first, **extra)


@pytest.mark.parametrize("name", ["base_model", "sd2_model", "sdxl_model"])
def test_text_is_what_the_pipeline_encodes(name: str, request: pytest.FixtureRequest) -> None:
    model: BaseModel = request.getfixturevalue(name)
    ours = encode_prompts(model, PROMPTS)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    theirs = pipeline_of(model).encode_prompt(PROMPTS, **options)
    torch.testing.assert_close(ours.states, theirs[0], atol=1e-5, rtol=1e-5)
    if model.is_sdxl:
        assert ours.pooled is not None
        torch.testing.assert_close(ours.pooled, theirs[2], atol=1e-5, rtol=1e-5)
        assert (ours.states.shape, ours.pooled.shape) == ((4, 16, 80), (4, 48))
    else:
        assert ours.pooled is None
    assert torch.equal(ours.states[0], ours.states[3])
    assert not torch.equal(ours.states[0], ours.states[2])


def test_each_tokenizer_pads_in_its_own_way(sdxl_model: BaseModel) -> None:
    ids = tokenize(sdxl_model.tokenizers, ["", "a red square"], sdxl_model.text_length)
    assert [part.shape for part in ids] == [(2, 16)] * 2
    assert torch.equal(ids[0][:, :2], ids[1][:, :2])
    assert [int(part[0, -1]) for part in ids] == [t.pad_token_id for t in sdxl_model.tokenizers]
    assert ids[0][0, -1] != ids[1][0, -1]


@torch.no_grad()
def test_the_unet_gets_what_the_pipeline_gives_it(sdxl_model: BaseModel) -> None:
    """One call for two images of another size and crop."""
    original, crop, target = torch.tensor([[96, 80.0]]), torch.tensor([[8, 0.0]]), torch.tensor([[64, 72.0]])
    text = encode_prompts(sdxl_model, ["a red square", "a blue square"])
    ids = time_ids(*(part.expand(2, -1) for part in (original, crop, target)))
    assert ids.tolist() == [[96, 80, 8, 0, 64, 72]] * 2
    pipeline = pipeline_of(sdxl_model)
    states, _, pooled, _ = pipeline.encode_prompt(
        ["a red square", "a blue square"], device="cpu", do_classifier_free_guidance=False
    )
    theirs = pipeline._get_add_time_ids((96, 80), (8, 0), (64, 72), states.dtype, text_encoder_projection_dim=48)
    latents, timesteps = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 800])
    expected = sdxl_model.unet(
        latents, timesteps, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": theirs.expand(2, -1)}
    ).sample
    found = sdxl_model.unet(latents, timesteps, text.states, added_cond_kwargs=added_conditions(text, ids)).sample
    assert torch.equal(found, expected)
    other = added_conditions(text, ids + 32)
    assert not torch.equal(found, sdxl_model.unet(latents, timesteps, text.states, added_cond_kwargs=other).sample)


def test_sizes_keep_their_precision(sdxl_folder: Any) -> None:
    """In bfloat16, 1000 and 1001 are one number."""
    model = load_base_model(sdxl_folder, torch.bfloat16)
    text = encode_prompts(model, [""])
    assert text.states.dtype == torch.bfloat16
    sizes = torch.tensor([[1001.0, 999.0]])
    added = added_conditions(text, time_ids(sizes, sizes, sizes))
    assert added is not None
    assert added["time_ids"].tolist() == [[1001.0, 999.0] * 3]
    sample = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert model.unet(sample, torch.tensor([5]), text.states, added_cond_kwargs=added).sample.dtype == torch.bfloat16


def test_what_is_missing_is_said(base_model: BaseModel, sdxl_model: BaseModel) -> None:
    assert added_conditions(encode_prompts(base_model, [""]), None) is None
    with pytest.raises(TrainerError, match="SDXL needs time ids"):
        added_conditions(encode_prompts(sdxl_model, [""]), None)
    ids = tokenize(sdxl_model.tokenizers, [""], sdxl_model.text_length)
    with pytest.raises(TrainerError, match="has 2 text encoders, token ids for 1 were given"):
        encode_tokens(sdxl_model, ids[0])
    with pytest.raises(TrainerError, match="has 1 text encoders, token ids for 2 were given"):
        encode_tokens(base_model, *ids)


def test_text_states_are_a_batch() -> None:
    text = TextStates(torch.randn(3, 2, 4), torch.randn(3, 5))
    assert text.pooled is not None
    assert len(text) == 3
    parts = [text.index(torch.tensor([0])), text.index(torch.tensor([False, True, True]))]
    again = TextStates.cat(parts)
    assert again.pooled is not None
    assert torch.equal(again.states, text.states) and torch.equal(again.pooled, text.pooled)
    half = text.to("cpu", torch.float16)
    assert half.pooled is not None
    assert (half.states.dtype, half.pooled.dtype) == (torch.float16, torch.float16)
    assert TextStates.cat([TextStates(text.states)] * 2).pooled is None
    wide = parts[0].expand(4)
    assert wide.pooled is not None
    assert (wide.states.shape, wide.pooled.shape) == ((4, 2, 4), (4, 5))
