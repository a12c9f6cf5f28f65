"""The numbers against ones computed another way, and a training that moves them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ipadapter_core import IPAdapter
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.models.features import Features
from ipadapter_trainer.models.image_features import dropped_features
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import TrainBatch, adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter
from ipadapter_trainer.training.objective import new_objective
from ipadapter_trainer.training.optimizers import new_optimizer
from ipadapter_trainer.training.steps import train_steps
from ipadapter_trainer.training.validation import QUARTERS, SEED, Samples, Validation, other_rows, stratified_timesteps

from .conftest import draw_image
from .tiny_models import COLOURS


def examples(model: BaseModel, adapter: IPAdapter, rows: int = 5, seed: int = 0) -> TrainBatch:
    generator, spec = torch.Generator().manual_seed(seed), adapter.spec
    shapes: list[tuple[int, ...]] = []
    if spec.face_dim is not None:
        shapes.append((rows, spec.face_dim))
    if spec.image_dim is not None:
        grid = () if spec.feature == "image_embeds" else (model.image_tokens,)
        shapes.append((rows, *grid, spec.image_dim))
    features = Features(
        torch.randn(rows, 4, 8, 8, generator=generator),
        encode_prompts(model, [f"a {COLOURS[i]} square" for i in range(rows)]),
        tuple(torch.randn(shape, generator=generator) for shape in shapes),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, -1) if model.is_sdxl else None,
    )
    unused = torch.full((rows,), -1)
    return TrainBatch(features, unused, unused, unused)


def with_images(batch: TrainBatch, *image_features: torch.Tensor) -> TrainBatch:
    return replace(batch, features=replace(batch.features, image_features=image_features))


def measure(model: BaseModel, adapter: IPAdapter, batch: TrainBatch, **options: Any) -> dict[str, float]:
    with adapt_unet(model, adapter) as denoising:
        return Validation(model, batch.features, **options).measure(denoising)


@pytest.fixture
def base_model(small_model: BaseModel) -> BaseModel:
    """What these tests look at does not depend on the UNet, so it is a small one."""
    return small_model


@pytest.fixture
def adapter(base_model: BaseModel) -> IPAdapter:
    torch.manual_seed(0)
    return new_adapter(base_model)


@pytest.fixture
def batch(base_model: BaseModel, adapter: IPAdapter) -> TrainBatch:
    return examples(base_model, adapter)


def test_the_base_alone_is_computed_again_by_hand(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    generator = torch.Generator().manual_seed(SEED)
    time = stratified_timesteps(5, 1000, generator)
    noise = torch.randn(20, 4, 8, 8, generator=generator)
    product = base_model.scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
    noisy = product.sqrt() * batch.features.latents.repeat(4, 1, 1, 1) + (1 - product).sqrt() * noise
    with torch.no_grad():
        said = base_model.unet(noisy, time, batch.features.text.states.repeat(4, 1, 1)).sample
    numbers = measure(base_model, adapter, batch)
    assert numbers["validation/loss_no_image"] == pytest.approx(float((said - noise).square().mean()), rel=1e-5)


def test_other_images_in_the_batch_give_the_other_losses(
    base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch
) -> None:
    numbers = measure(base_model, adapter, batch)
    (embeds,) = batch.features.image_features
    rolled = measure(base_model, adapter, with_images(batch, embeds.roll(-1, 0)))
    none = measure(base_model, adapter, with_images(batch, torch.zeros_like(embeds)))
    assert numbers["validation/loss_shuffled"] == pytest.approx(rolled["validation/loss"], rel=1e-5)
    assert numbers["validation/loss_dropped"] == pytest.approx(none["validation/loss"], rel=1e-5)
    losses = [numbers[f"validation/loss{name}"] for name in ("", "_no_image", "_dropped", "_shuffled")]
    assert len({round(loss, 6) for loss in losses}) == 4
    for name in ("no_image", "shuffled"):
        gap = numbers[f"validation/loss_{name}"] - losses[0]
        assert numbers[f"validation/gap_{name}"] == pytest.approx(gap, abs=1e-6)
    for name in ("loss", "gap_shuffled"):
        quarters = [numbers[f"validation/{name}_t{quarter}"] for quarter in range(QUARTERS)]
        assert sum(quarters) / 4 == pytest.approx(numbers[f"validation/{name}"], abs=1e-6)
    assert numbers["validation/gap_shuffled_error"] > 0


@pytest.mark.parametrize("name", ["plus", "faceid-plusv2"])
def test_a_dropped_image_is_that_of_the_kind(base_model: BaseModel, name: str) -> None:
    adapter = new_adapter(base_model, TRAIN_KINDS[name])
    batch = examples(base_model, adapter, rows=2)
    dropped = [f.expand(2, *f.shape[1:]) for f in dropped_features(base_model, adapter.spec)]
    none = measure(base_model, adapter, with_images(batch, *dropped))
    numbers = measure(base_model, adapter, batch)
    assert numbers["validation/loss_dropped"] == pytest.approx(none["validation/loss"], rel=1e-5)


def test_the_same_weights_give_the_same_numbers(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    """Again, in other chunks, and without touching any random state."""
    with adapt_unet(base_model, adapter) as denoising:
        validation = Validation(base_model, batch.features)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        first = validation.measure(denoising)
        assert random.getstate() == states[0]
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
        assert torch.equal(torch.get_rng_state(), states[2])
        assert validation.measure(denoising) == first
        for chunk in (3, 100):
            again = Validation(base_model, batch.features, chunk=chunk).measure(denoising)
            assert again == pytest.approx(first, rel=1e-4, abs=1e-6)
        with torch.no_grad():
            adapter.projector.proj.weight.mul_(2)
        after = validation.measure(denoising)
        assert after["validation/loss"] != first["validation/loss"]
        assert after["validation/loss_no_image"] == first["validation/loss_no_image"]
        rests = base_model.unet(batch.features.latents, 500, batch.features.text.states).sample
    assert torch.equal(rests, base_model.unet(batch.features.latents, 500, batch.features.text.states).sample)


def test_the_attention_ratio(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    """Values twice as large double it in the first layer, where the text attention is still the same; without values
    it is 0, and the loss that of the base model.
    """
    with adapt_unet(base_model, adapter) as denoising:
        validation = Validation(base_model, batch.features)
        numbers, ratios = validation.measure(denoising), validation.layer_ratios
        assert list(ratios) == [2 * i + 1 for i in range(len(base_model.sites))]
        assert numbers["validation/attention_ratio"] == pytest.approx(sum(ratios.values()) / len(ratios))
        assert denoising.application.observe is None
        values = [to_v.weight for _, to_v in adapter.layers.pairs()]
        for factor, expected in ((2, 2 * ratios[1]), (0, 0.0)):
            with torch.no_grad():
                for value in values:
                    value.mul_(factor)
            numbers = validation.measure(denoising)
            assert validation.layer_ratios[1] == pytest.approx(expected, rel=1e-5)
    assert numbers["validation/loss"] == pytest.approx(numbers["validation/loss_no_image"], rel=1e-6)
    assert numbers["validation/gap_shuffled"] == numbers["validation/attention_ratio"] == 0


def test_the_gap_opens_when_the_image_is_read(model_folder: Path) -> None:
    """An adapter that is trained on a bright and a dark example, which only their images tell apart."""
    base_model = load_base_model(model_folder)
    torch.manual_seed(0)
    adapter = new_adapter(base_model)
    batch = examples(base_model, adapter, rows=2)
    shade = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1).expand(2, 4, 8, 8)
    same_text = replace(batch.features, latents=shade, text=encode_prompts(base_model, [""]).expand(2))
    batch = replace(batch, features=same_text)
    generator = torch.Generator().manual_seed(1)

    def steps() -> Any:
        for _ in repeat(None):
            yield TrainBatch(
                same_text,
                torch.zeros(2),
                torch.randn(2, 4, 8, 8, generator=generator),
                torch.randint(1000, (2,), generator=generator),
            )

    with adapt_unet(base_model, adapter) as denoising:
        validation = Validation(base_model, batch.features)
        before = validation.measure(denoising)
        for _ in train_steps(denoising, steps(), optimizer=new_optimizer(adapter, 1e-2), steps=60):
            pass
        after = validation.measure(denoising)
    assert abs(before["validation/gap_shuffled"]) < before["validation/gap_shuffled_error"]
    assert after["validation/gap_shuffled"] > 3 * after["validation/gap_shuffled_error"] > 0
    assert after["validation/gap_no_image"] > after["validation/gap_shuffled"]


def test_without_another_image_nothing_is_shuffled(
    base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch
) -> None:
    (embeds,) = batch.features.image_features
    alike = measure(base_model, adapter, with_images(batch, embeds[:1].expand(5, -1)))
    one = measure(base_model, adapter, examples(base_model, adapter, rows=1))
    for numbers in (alike, one):
        assert not [name for name in numbers if "shuffled" in name]
        assert {"validation/loss", "validation/gap_no_image", "validation/loss_t3"} <= numbers.keys()


def test_the_other_image_is_the_next_that_differs() -> None:
    a, b, c = torch.eye(3)
    assert other_rows([torch.stack([a, b, c])]).tolist() == [1, 2, 0]  # type: ignore[union-attr]
    assert other_rows([torch.stack([a, a, b, b, c])]).tolist() == [2, 2, 4, 4, 0]  # type: ignore[union-attr]
    assert other_rows([torch.stack([a, a]), torch.stack([b, c])]).tolist() == [1, 0]  # type: ignore[union-attr]
    assert other_rows([torch.stack([a, a])]) is None


@pytest.mark.parametrize(("count", "length"), [(16, 1000), (3, 1000), (5, 7)])
def test_timesteps_are_spread_over_the_schedule(count: int, length: int) -> None:
    drawn = stratified_timesteps(count, length, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < length
    quarters = drawn.view(QUARTERS, count)
    for quarter, times in enumerate(quarters):
        places = (times.sort().values.float() + 0.5) / length * QUARTERS * count - quarter * count
        assert (places.floor() - torch.arange(count)).abs().max() <= 4 * QUARTERS * count / length + 1
    assert not torch.equal(quarters[0].argsort(), torch.arange(count))  # an example is not always the noisier one


def test_half_precision_is_that_of_the_steps(small_folder: Path) -> None:
    """A LoRA in float32 inside a bfloat16 base needs autocast, as a training step has it."""
    model = load_base_model(small_folder, torch.bfloat16)
    adapter = new_adapter(model, TRAIN_KINDS["faceid"])
    batch = examples(model, adapter, rows=2)
    with adapt_unet(model, adapter) as denoising:
        validation = Validation(model, batch.features)
        numbers = validation.measure(denoising)
        step = TrainBatch(batch.features, torch.zeros(2), validation._noise[:2], validation._timesteps[:2])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            first_quarter = float(denoising.loss(step))
        assert numbers["validation/loss_t0"] == pytest.approx(first_quarter, rel=1e-6)


def test_a_compiled_unet_is_not_compiled_again(small_folder: Path) -> None:
    model = load_base_model(small_folder)
    adapter = new_adapter(model)
    batch = examples(model, adapter, rows=2)
    sample = Samples([(draw_image("red"), "a red square")], steps=1)
    compiled: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(str(graph))
        return graph.forward

    plain = measure(model, adapter, batch)
    model.unet.compile(backend=backend)
    with adapt_unet(model, adapter) as denoising:
        validation = Validation(model, batch.features, sample=sample)
        assert validation.measure(denoising) == plain
        validation.samples(adapter)
        assert not compiled


@pytest.mark.parametrize(("model", "kind"), [("base_model", "base"), ("sdxl_model", "plus"), ("sd2_model", "faceid")])
def test_samples(model: str, kind: str, request: pytest.FixtureRequest) -> None:
    """A grid of fixed images; the training beside it goes on undisturbed, and encoders leave the memory."""
    base: BaseModel = request.getfixturevalue(model)
    torch.manual_seed(0)
    adapter = new_adapter(base, TRAIN_KINDS[kind])
    batch = examples(base, adapter, rows=3)
    images = [(draw_image(colour), f"a {colour} square") for colour in COLOURS[:2]]
    validation = Validation(base, batch.features, sample=Samples(images, "a blue square", steps=2), chunk=1)
    base.release("vae", "text_encoders", "image_encoder")
    loaded = set(base._loaded)
    with adapt_unet(base, adapter) as denoising:
        base.release("image_encoder")
        state, processors = torch.get_rng_state(), base.unet.attn_processors
        grid = validation.samples(adapter)
        assert grid is not None
        left = grid.width - 5 * 136  # of the labels
        assert 50 < left < 144 and grid.height == 2 * 136 + 45  # a title of two lines
        assert torch.equal(torch.get_rng_state(), state)
        assert all(base.unet.attn_processors[name] is processor for name, processor in processors.items())
        assert set(base._loaded) == loaded
        one_go = Validation(base, batch.features, sample=Samples(images, "a blue square", steps=2), chunk=8).samples(
            adapter
        )
        difference = np.abs(np.asarray(grid, np.int16) - np.asarray(one_go, np.int16))
        assert difference.max() <= 2
        with torch.no_grad():
            next(iter(adapter.layers.pairs()))[1].weight.mul_(-3)
        columns = np.asarray(validation.samples(adapter), np.int16) - np.asarray(grid, np.int16)
    changed = [bool(columns[:, left + x * 136 : left + 128 + x * 136].any()) for x in range(5)]
    assert changed == [False, False, True, True, True]
    assert not denoising.application.key_values


def test_samples_may_be_off_or_without_a_text(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    assert Validation(base_model, batch.features).samples(adapter) is None
    assert Validation(base_model, batch.features, sample=Samples([])).samples(adapter) is None
    grid = Validation(base_model, batch.features, sample=Samples([(draw_image("red"), "")], steps=1)).samples(adapter)
    assert grid is not None and grid.width == 16 + 4 * 136


def test_samples_follow_the_noise_schedule_of_the_training(v_model: BaseModel) -> None:
    adapter = new_adapter(v_model)
    batch, image = examples(v_model, adapter, rows=1), [(draw_image("red"), "a red square")]
    scheduler = new_objective(v_model.scheduler, zero_terminal_snr=True).scheduler
    usual, rescaled = (
        Validation(v_model, batch.features, sample=Samples(image, steps=2, scheduler=s)).samples(adapter)
        for s in (None, scheduler)
    )
    assert np.asarray(usual).shape == np.asarray(rescaled).shape
    assert not np.array_equal(np.asarray(usual), np.asarray(rescaled))
