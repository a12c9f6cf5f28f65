from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from ipadapter_trainer.base_model import BaseModel
from ipadapter_trainer.data import PictureDataset, Recipe, collate
from ipadapter_trainer.engine import (
    TrainingBatch,
    check_loss,
    new_adapter,
    new_optimizer,
    train_steps,
    training_loss,
)
from ipadapter_trainer.errors import DivergedError, TrainerError
from ipadapter_trainer.examples import find_examples
from ipadapter_trainer.features import Features, encode_batch

from ipadapter_core import AdapterApplication, AdapterError, diffusers_sites, inject, save_adapter


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def features(base_model: BaseModel, pictures: Path) -> Features:
    dataset = PictureDataset(find_examples(pictures), base_model, Recipe(64, text_dropout=0, both_dropout=0))
    return encode_batch(base_model, collate([dataset[i] for i in range(4)]))


KEEP = torch.zeros(4)


def test_keys_and_values_start_as_the_unets_own(base_model: BaseModel) -> None:
    adapter = new_adapter(base_model)
    modules = dict(base_model.unet.named_modules())
    sites = diffusers_sites(base_model.unet)
    assert len(sites) == 16
    for site, (to_k, to_v) in zip(sites, adapter.layers.pairs(), strict=True):
        assert torch.equal(to_k.weight, modules[site.name].to_k.weight)
        assert torch.equal(to_v.weight, modules[site.name].to_v.weight)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())


def test_features_are_those_of_the_frozen_models(base_model: BaseModel, features: Features) -> None:
    assert features.latents.shape == (4, 4, 8, 8)
    assert features.text_states.shape == (4, 16, 32)
    assert features.image_embeds.shape == (4, 24)
    both = Features.cat([features.index(torch.tensor([0])), features.index(torch.tensor([1, 2, 3]))])
    assert torch.equal(both.latents, features.latents)
    assert torch.equal(both.image_embeds, features.image_embeds)


def test_latents_are_drawn_from_the_posterior_by_the_generator(base_model: BaseModel, pictures: Path) -> None:
    dataset = PictureDataset(find_examples(pictures), base_model, Recipe(64))
    batch = collate([dataset[0], dataset[1]])
    first, again, other = (encode_batch(base_model, batch, seeded(s)).latents for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weight_zero_is_the_plain_unet(base_model: BaseModel, features: Features) -> None:
    unet, time = base_model.unet, torch.tensor([500] * 4)
    plain = unet(features.latents, time, features.text_states).sample
    key_values = new_adapter(base_model)(features.image_embeds)
    with inject(unet, AdapterApplication(key_values, weight=0.0)):
        assert torch.equal(unet(features.latents, time, features.text_states).sample, plain)
    with inject(unet, AdapterApplication(key_values)):
        assert not torch.equal(unet(features.latents, time, features.text_states).sample, plain)


@pytest.mark.parametrize("name", ["base_model", "v_model"])
def test_the_loss_is_the_mean_squared_error_of_the_target(
    name: str, features: Features, request: pytest.FixtureRequest
) -> None:
    """Computed a second time by hand, noise and timesteps drawn in the same order."""
    model: BaseModel = request.getfixturevalue(name)
    adapter = new_adapter(model)
    loss = training_loss(model, adapter, features, torch.tensor([1, 0, 0, 0]), seeded())
    generator = seeded()
    noise = torch.randn(features.latents.shape, generator=generator)
    time = torch.randint(1000, (4,), generator=generator)
    product = model.scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
    alpha, sigma = product.sqrt(), (1 - product).sqrt()
    target = noise if name == "base_model" else alpha * noise - sigma * features.latents
    embeds = features.image_embeds.clone()
    embeds[0] = 0
    with inject(model.unet, AdapterApplication(adapter(embeds))):
        said = model.unet(alpha * features.latents + sigma * noise, time, features.text_states).sample
    torch.testing.assert_close(loss, (said - target).square().mean())


def test_gradients_reach_every_adapter_weight_and_nothing_else(base_model: BaseModel, features: Features) -> None:
    adapter = new_adapter(base_model)
    training_loss(base_model, adapter, features, KEEP, seeded()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in base_model.unet.parameters())


def test_one_pair_can_be_overfitted_and_the_unet_stays_as_it_was(base_model: BaseModel, features: Features) -> None:
    before = {k: v.clone() for k, v in base_model.unet.state_dict().items()}
    processors = base_model.unet.attn_processors
    adapter = new_adapter(base_model)
    pair = features.index(torch.tensor([0, 0]))

    def fixed_loss() -> float:
        with torch.no_grad():
            return sum(float(training_loss(base_model, adapter, pair, KEEP[:2], seeded(s))) for s in range(6)) / 6

    start = fixed_loss()
    stream = train_steps(
        base_model,
        adapter,
        repeat((pair, KEEP[:2])),
        optimizer=new_optimizer(adapter, 1e-2),
        generator=seeded(9),
        steps=40,
    )
    assert [p.step for p in stream] == list(range(1, 41))
    assert fixed_loss() < 0.95 * start
    assert all(torch.equal(v, before[k]) for k, v in base_model.unet.state_dict().items())
    assert base_model.unet.attn_processors == processors


def test_pictures_may_be_made_between_steps(base_model: BaseModel, features: Features) -> None:
    from ipadapter_trainer.generate import generate

    adapter = new_adapter(base_model)
    plain = generate(base_model, None, prompts=["a red square"], image_embeds=None, steps=2)
    for _ in train_steps(
        base_model,
        adapter,
        repeat((features, KEEP)),
        optimizer=new_optimizer(adapter),
        generator=seeded(),
        steps=1,
    ):
        between = generate(base_model, None, prompts=["a red square"], image_embeds=None, steps=2)
    assert torch.equal(between, plain)


def test_accumulated_batches_are_one_large_batch(base_model: BaseModel, features: Features) -> None:
    """The gradient of two half batches equals that of the whole, given the same noise and timesteps."""

    def halves() -> Iterator[TrainingBatch]:
        yield features.index(torch.tensor([0, 1])), KEEP[:2]
        yield features.index(torch.tensor([2, 3])), KEEP[2:]

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    adapter = new_adapter(base_model)
    twin = new_adapter(base_model)
    twin.load_state_dict(adapter.state_dict())
    prepared, optimizer = accelerator.prepare(adapter, torch.optim.SGD(adapter.parameters(), lr=1.0))
    stream = train_steps(
        base_model,
        prepared,
        halves(),
        optimizer=optimizer,
        generator=seeded(),
        steps=1,
        accelerator=accelerator,
        max_grad_norm=0,
    )
    (progress,) = stream
    assert progress.images == 4

    generator = seeded()
    losses = [training_loss(base_model, twin, f, d, generator) for f, d in halves()]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(progress.loss, (sum(losses) / 2).detach())  # type: ignore[operator]
    for weight, other in zip(adapter.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other - other.grad, atol=1e-6, rtol=1e-5)


def test_training_ends_with_its_batches(base_model: BaseModel, features: Features) -> None:
    adapter = new_adapter(base_model)
    optimizer = new_optimizer(adapter)
    stream = train_steps(base_model, adapter, [(features, KEEP)] * 2, optimizer=optimizer, generator=seeded(), steps=9)
    assert len(list(stream)) == 2


def test_init_from_starts_with_the_files_weights(base_model: BaseModel, tmp_path: Path) -> None:
    adapter = new_adapter(base_model)
    save_adapter(tmp_path / "a.safetensors", adapter)
    again = new_adapter(base_model, init_from=tmp_path / "a.safetensors")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, adapter.state_dict()[name])
    assert all(p.requires_grad for p in again.parameters())
    with pytest.raises(TrainerError, match="its tokens is 4, this training's 8"):
        new_adapter(base_model, tokens=8, init_from=tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="no such file"):
        new_adapter(base_model, init_from=tmp_path / "absent.safetensors")


def test_a_loss_that_is_no_number_is_refused() -> None:
    assert check_loss(3, 0.5) == 0.5
    with pytest.raises(DivergedError, match="nan at step 3"):
        check_loss(3, float("nan"))
