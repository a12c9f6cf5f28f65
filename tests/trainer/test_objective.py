from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from ipadapter_trainer.data.augmentation import dropout
from ipadapter_trainer.errors import BaseModelError, ConfigError
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.training.objective import dropped, new_objective, noisy_latents_and_target

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


def test_dropped_replaces_the_marked_rows_only() -> None:
    embeds, hidden = torch.ones(3, 7), torch.ones(3, 2, 5)
    none = (torch.zeros(1, 7), torch.full((1, 2, 5), 0.5))
    first, second = dropped((embeds, hidden), none, torch.tensor([0, 1, 0]))
    assert first.sum(1).tolist() == [7, 0, 7]
    assert second.sum((1, 2)).tolist() == [10, 5, 10]


def test_one_draw_decides_in_the_originals_order() -> None:
    assert dropout(0.04) == (True, False)
    assert dropout(0.07) == (False, True)
    assert dropout(0.12) == (True, True)
    assert dropout(0.16) == (False, False)


def test_the_objective_is_the_schedulers_and_a_mismatch_is_refused(base_model: BaseModel, v_model: BaseModel) -> None:
    assert new_objective(base_model.scheduler).prediction_type == "epsilon"
    assert new_objective(v_model.scheduler, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"'v_prediction'.*has 'epsilon'"):
        new_objective(base_model.scheduler, prediction_type="v_prediction")


def test_zero_terminal_snr_ends_in_pure_noise_and_needs_the_v_target(base_model: BaseModel, v_model: BaseModel) -> None:
    scheduler = new_objective(v_model.scheduler, zero_terminal_snr=True).scheduler
    noisy, target = noisy_latents_and_target(scheduler, LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(noisy[-1], NOISE[-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(target[-1], -LATENTS[-1], atol=1e-3, rtol=1e-3)
    assert v_model.scheduler.config["rescale_betas_zero_snr"] is False
    with pytest.raises(ConfigError, match="nothing to learn"):
        new_objective(base_model.scheduler, zero_terminal_snr=True)
