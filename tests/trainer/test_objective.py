from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from ipadapter_trainer.base_model import BaseModel
from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.objective import dropout, dropped, noisy_latents_and_target

LATENTS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
TIMESTEPS = torch.tensor([0, 10, 500, 900, 999])


def alphas_and_sigmas(scheduler: DDPMScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    product = scheduler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    return product.sqrt(), (1 - product).sqrt()


def test_epsilon(base_model: BaseModel) -> None:
    noisy, target = noisy_latents_and_target(base_model.scheduler, LATENTS, NOISE, TIMESTEPS)
    alpha, sigma = alphas_and_sigmas(base_model.scheduler)
    torch.testing.assert_close(noisy, alpha * LATENTS + sigma * NOISE)
    assert target is NOISE


def test_v_prediction(v_model: BaseModel) -> None:
    _, target = noisy_latents_and_target(v_model.scheduler, LATENTS, NOISE, TIMESTEPS)
    alpha, sigma = alphas_and_sigmas(v_model.scheduler)
    torch.testing.assert_close(target, alpha * NOISE - sigma * LATENTS)


@pytest.mark.parametrize("name", ["base_model", "v_model"])
def test_a_perfect_prediction_gives_the_scheduler_back_the_clean_latents(
    name: str, request: pytest.FixtureRequest
) -> None:
    from diffusers import DDIMScheduler

    model: BaseModel = request.getfixturevalue(name)
    noisy, target = noisy_latents_and_target(model.scheduler, LATENTS, NOISE, TIMESTEPS)
    ddim = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    ddim.set_timesteps(1000)
    clean = torch.cat(
        [ddim.step(target[i : i + 1], t, noisy[i : i + 1]).pred_original_sample for i, t in enumerate(TIMESTEPS)]
    )
    torch.testing.assert_close(clean, LATENTS, atol=2e-4, rtol=1e-3)


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"'sample'.*epsilon, v_prediction"):
        noisy_latents_and_target(DDPMScheduler(prediction_type="sample"), LATENTS, NOISE, TIMESTEPS)


def test_dropped_zeroes_the_marked_rows_only() -> None:
    embeds = torch.ones(3, 7)
    assert dropped(embeds, torch.tensor([0, 1, 0])).sum(1).tolist() == [7, 0, 7]


def test_one_draw_decides_in_the_originals_order() -> None:
    assert dropout(0.04) == (True, False)
    assert dropout(0.07) == (False, True)
    assert dropout(0.12) == (True, True)
    assert dropout(0.16) == (False, False)
    image, text = dropout(torch.tensor([0.04, 0.07, 0.12, 0.16]))
    assert image.tolist() == [True, False, True, False]
    assert text.tolist() == [False, True, True, False]
