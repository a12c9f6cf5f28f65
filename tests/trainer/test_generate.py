from __future__ import annotations

import pytest
import torch
from ipadapter_trainer.base_model import BaseModel
from ipadapter_trainer.engine import new_adapter
from ipadapter_trainer.errors import TrainerError
from ipadapter_trainer.features import encode_pictures
from ipadapter_trainer.generate import generate
from PIL import Image

from ipadapter_core import AdapterError, IPAdapter

EMBEDS = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red square", "a blue square", ""]


@pytest.fixture(scope="module")
def adapter(base_model: BaseModel) -> IPAdapter:
    torch.manual_seed(0)
    return new_adapter(base_model).eval()


def test_shape_range_and_determinism(base_model: BaseModel, adapter: IPAdapter) -> None:
    first, again = (
        generate(base_model, adapter, prompts=PROMPTS, image_embeds=EMBEDS, steps=3, seed=1) for _ in range(2)
    )
    assert first.shape == (3, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert generate(base_model, None, prompts=[""], image_embeds=None, steps=1, size=32).shape[-1] == 32


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_is_its_pictures_one_by_one(base_model: BaseModel, adapter: IPAdapter, guidance: float) -> None:
    weights = [0.0, 0.5, 1.0]
    batch = generate(
        base_model, adapter, prompts=PROMPTS, image_embeds=EMBEDS, weight=weights, steps=2, guidance=guidance
    )
    for i, (prompt, weight) in enumerate(zip(PROMPTS, weights, strict=True)):
        alone = generate(
            base_model,
            adapter,
            prompts=[prompt],
            image_embeds=EMBEDS[i : i + 1],
            weight=weight,
            steps=2,
            guidance=guidance,
            seed=i,
        )
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_weight_zero_and_no_embeddings_are_no_adapter(base_model: BaseModel, adapter: IPAdapter) -> None:
    plain = generate(base_model, None, prompts=PROMPTS, image_embeds=None, steps=2)
    zero = generate(base_model, adapter, prompts=PROMPTS, image_embeds=EMBEDS, weight=0, steps=2)
    without = generate(base_model, adapter, prompts=PROMPTS, image_embeds=None, steps=2)
    with_image = generate(base_model, adapter, prompts=PROMPTS, image_embeds=EMBEDS, steps=2)
    assert torch.equal(zero, plain)
    assert torch.equal(without, plain)
    assert not torch.equal(with_image, plain)


def test_v_prediction_differs_from_epsilon(base_model: BaseModel, v_model: BaseModel) -> None:
    pictures = [generate(m, None, prompts=[""], image_embeds=None, steps=2) for m in (base_model, v_model)]
    assert not torch.equal(*pictures)


def test_one_prompt_serves_many_weights(base_model: BaseModel, adapter: IPAdapter) -> None:
    row = generate(base_model, adapter, prompts=[""], image_embeds=EMBEDS[:1], weight=[0, 0.5, 1], steps=1)
    assert len(row) == 3


def test_what_does_not_fit_is_refused(base_model: BaseModel, adapter: IPAdapter) -> None:
    with pytest.raises(TrainerError, match="prompts has 2 rows in a batch of 3"):
        generate(base_model, adapter, prompts=["", ""], image_embeds=EMBEDS)
    with pytest.raises(AdapterError, match="7 wide"):
        generate(base_model, adapter, prompts=[""], image_embeds=torch.zeros(1, 7))
    with pytest.raises(TrainerError, match="multiple of 8"):
        generate(base_model, None, prompts=[""], image_embeds=None, size=60)


def test_pictures_of_any_mode_are_encoded(base_model: BaseModel) -> None:
    pictures = [Image.new(mode, (50, 40)) for mode in ("RGB", "L", "RGBA", "P", "CMYK")]
    assert encode_pictures(base_model, pictures).shape == (5, 24)


def test_another_kind_is_refused(base_model: BaseModel) -> None:
    from ipadapter_core import diffusers_sites, init_adapter, new_spec

    sites = diffusers_sites(base_model.unet)
    spec = new_spec("plus", [site.width for site in sites], 32, image_width=24, dim_head=16)
    with pytest.raises(TrainerError, match="plus adapter"):
        generate(base_model, init_adapter(spec), prompts=[""], image_embeds=EMBEDS[:1])
