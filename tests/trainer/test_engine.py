from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, repeat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from ipadapter_core import AdapterApplication, AdapterError, IPAdapter, diffusers_sites, inject, save_adapter
from ipadapter_trainer.errors import DivergedError, TrainerError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import TextStates, encode_prompts
from ipadapter_trainer.models.features import Features
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import AdaptedUNet, TrainBatch, adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter
from ipadapter_trainer.training.objective import Objective
from ipadapter_trainer.training.optimizers import new_optimizer
from ipadapter_trainer.training.steps import check_loss, train_steps

KEEP = torch.zeros(4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(model: BaseModel, adapter: IPAdapter, seed: int = 0, rows: int = 4) -> TrainBatch:
    """Features of the right shapes for a model and an adapter, and the draws of a step."""
    generator, spec = seeded(seed), adapter.spec
    shapes: list[tuple[int, ...]] = []
    if spec.face_dim is not None:
        shapes.append((rows, spec.face_dim))
    if spec.image_dim is not None:
        grid = () if spec.feature == "image_embeds" else (model.image_tokens,)
        shapes.append((rows, *grid, spec.image_dim))
    text = encode_prompts(model, ["a red square"]).expand(rows)
    return TrainBatch(
        Features(
            torch.randn(rows, 4, 8, 8, generator=generator),
            text,
            tuple(torch.randn(shape, generator=generator) for shape in shapes),
            torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(rows, -1) if model.is_sdxl else None,
        ),
        drop_image_embeds=torch.zeros(rows),
        noise=torch.randn(rows, 4, 8, 8, generator=generator),
        timesteps=torch.randint(1000, (rows,), generator=generator),
    )


@pytest.fixture
def adapter(base_model: BaseModel) -> IPAdapter:
    torch.manual_seed(0)
    return new_adapter(base_model)


@pytest.fixture
def batch(base_model: BaseModel, adapter: IPAdapter) -> TrainBatch:
    return random_batch(base_model, adapter)


def part(batch: TrainBatch, rows: list[int]) -> TrainBatch:
    chosen = torch.tensor(rows)
    return TrainBatch(
        batch.features.index(chosen), batch.drop_image_embeds[chosen], batch.noise[chosen], batch.timesteps[chosen]
    )


def test_keys_and_values_start_as_the_unets_own(base_model: BaseModel, adapter: IPAdapter) -> None:
    modules = dict(base_model.unet.named_modules())
    sites = diffusers_sites(base_model.unet)
    assert len(sites) == 16
    for site, (to_k, to_v) in zip(sites, adapter.layers.pairs(), strict=True):
        assert torch.equal(to_k.weight, modules[site.name].to_k.weight)
        assert torch.equal(to_v.weight, modules[site.name].to_v.weight)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())


def test_features_can_be_split_and_joined(batch: TrainBatch) -> None:
    features = batch.features
    both = Features.cat([features.index(torch.tensor([0])), features.index(torch.tensor([1, 2, 3]))])
    assert torch.equal(both.latents, features.latents)
    assert torch.equal(both.text.states, features.text.states)
    assert torch.equal(both.image_features[0], features.image_features[0])


def test_weight_zero_is_the_plain_unet(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    unet, time, text = base_model.unet, torch.tensor([500] * 4), batch.features.text.states
    plain = unet(batch.features.latents, time, text).sample
    key_values = adapter(*batch.features.image_features)
    with inject(unet, AdapterApplication(key_values, weight=0.0, rows=range(4))):
        assert torch.equal(unet(batch.features.latents, time, text).sample, plain)
    with inject(unet, AdapterApplication(key_values, rows=range(4))):
        assert not torch.equal(unet(batch.features.latents, time, text).sample, plain)


@pytest.mark.parametrize(("kind", "autocast"), [("base", False), ("faceid", True)])
def test_the_unet_computes_in_its_own_precision(model_folder: Path, kind: str, autocast: bool) -> None:
    """Autocast would have its norms return float32 on a GPU. A LoRA in float32 needs it."""
    model = load_base_model(model_folder, torch.bfloat16)
    adapter = new_adapter(model, TRAIN_KINDS[kind])
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = set()
    hook = model.unet.conv_out.register_forward_hook(
        lambda layer, args, out: seen.add((torch.is_autocast_enabled("cpu"), out.dtype))
    )
    with adapt_unet(model, adapter) as denoising, accelerator.autocast():
        loss = denoising.loss(random_batch(model, adapter))
        assert torch.is_autocast_enabled("cpu")
    hook.remove()
    loss.backward()
    assert seen == {(autocast, torch.bfloat16)}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_what_the_model_receives_is_moved_and_cast(base_model: BaseModel) -> None:
    given = torch.arange(3, dtype=torch.float16)
    assert base_model.to_device(given) is given
    assert torch.equal(base_model.to_device(given, torch.float32), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("name", ["base_model", "v_model"])
def test_the_loss_is_the_mean_squared_error_of_the_target(name: str, request: pytest.FixtureRequest) -> None:
    """Computed a second time by hand."""
    model: BaseModel = request.getfixturevalue(name)
    adapter = new_adapter(model)
    batch = replace(random_batch(model, adapter), drop_image_embeds=torch.tensor([1, 0, 0, 0]))
    with adapt_unet(model, adapter) as denoising:
        loss = denoising.loss(batch)
    product = model.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    alpha, sigma = product.sqrt(), (1 - product).sqrt()
    latents = batch.features.latents
    target = batch.noise if name == "base_model" else alpha * batch.noise - sigma * latents
    embeds = batch.features.image_features[0].clone()
    embeds[0] = 0
    with inject(model.unet, AdapterApplication(adapter(embeds), rows=range(4))):
        said = model.unet(alpha * latents + sigma * batch.noise, batch.timesteps, batch.features.text.states).sample
    torch.testing.assert_close(loss, (said - target).square().mean())


@pytest.mark.parametrize("family", ["model_folder", "sd2_folder", "sdxl_folder"])
@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_every_kind_trains_on_every_family(family: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Gradients reach every weight of the adapter, the LoRA's after its first step, and nothing else."""
    from ipadapter_trainer.models.base_model import load_base_model

    model = load_base_model(request.getfixturevalue(family))
    adapter = new_adapter(model, TRAIN_KINDS[kind])
    assert (adapter.spec.kind, adapter.spec.shortcut) == (TRAIN_KINDS[kind].kind, TRAIN_KINDS[kind].shortcut)
    batch = random_batch(model, adapter)
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    with adapt_unet(model, adapter) as denoising:
        optimizer = new_optimizer(adapter, 1e-3)
        first, second = (p.loss for p in train_steps(denoising, repeat(batch), optimizer=optimizer, steps=2))
        assert second < first
        denoising.loss(batch).backward()
    without = [n for n, p in adapter.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    assert all(p.grad is None for p in model.unet.parameters())


def test_a_dropped_image_is_encoded_as_its_kind_is(base_model: BaseModel) -> None:
    zero_pixels = torch.zeros(1, 3, 32, 32)
    hidden = base_model.image_encoder(zero_pixels, output_hidden_states=True).hidden_states[-2]
    for kind in TRAIN_KINDS.values():
        with adapt_unet(base_model, new_adapter(base_model, kind)) as denoising:
            *faces, image = (*denoising.no_image, None) if not kind.takes_image else denoising.no_image
        assert all(torch.equal(face, torch.zeros(1, 512)) for face in faces)
        assert len(faces) == int(kind.takes_face)
        if kind.takes_hidden_states:
            assert torch.equal(image, hidden)
        elif kind.takes_image:
            assert torch.equal(image, torch.zeros(1, 24))


def test_a_lora_rests_between_steps(base_model: BaseModel) -> None:
    adapter = new_adapter(base_model, TRAIN_KINDS["faceid"])
    torch.nn.init.normal_(adapter.lora.part(0, "to_q").up.weight)
    batch = random_batch(base_model, adapter)
    inputs = (batch.features.latents, torch.tensor(500), batch.features.text.states)
    plain = base_model.unet(*inputs).sample
    with adapt_unet(base_model, adapter) as denoising:
        assert torch.equal(base_model.unet(*inputs).sample, plain)
        denoising.enable_adapter(batch.features.image_features, KEEP)
        assert not torch.equal(base_model.unet(*inputs).sample, plain)
        denoising.disable_adapter()
        assert torch.equal(base_model.unet(*inputs).sample, plain)


@pytest.mark.parametrize("tuning", ["checkpointing", "fp8", "compile"])
def test_memory_and_speed_options_leave_the_gradients(tuning: str, model_folder: Path, small_folder: Path) -> None:
    """Checkpointing and compiling give the same gradients, a base in 8 bit nearly the same."""
    from ipadapter_trainer.models.base_model import load_base_model
    from ipadapter_trainer.models.prepare_unet import prepare_unet

    model = load_base_model(small_folder if tuning == "compile" else model_folder)  # each layer is traced
    torch.manual_seed(0)
    adapter = new_adapter(model, TRAIN_KINDS["base" if tuning == "compile" else "faceid"])
    batch = random_batch(model, adapter)

    def gradients() -> list[torch.Tensor]:
        with adapt_unet(model, adapter) as denoising:
            denoising.loss(batch).backward()
            grads = [p.grad.clone() for p in adapter.parameters()]
        adapter.zero_grad()
        return grads

    plain = gradients()
    if tuning == "compile":
        torch._dynamo.reset()
    prepare_unet(
        model,
        fp8=tuning == "fp8",
        gradient_checkpointing=tuning == "checkpointing",
        compiled=tuning == "compile",
        backend="eager",  # the compiler's graph without the minutes that a C++ compiler takes
    )
    tuned = gradients()
    a, b = (torch.cat([grad.flatten() for grad in grads]) for grads in (plain, tuned))
    assert (a - b).norm() <= (0.2 if tuning == "fp8" else 1e-4) * a.norm()
    stored = {weight.dtype for name, weight in model.unet.state_dict().items() if name.endswith("conv1.weight")}
    assert stored == {torch.float8_e4m3fn if tuning == "fp8" else torch.float32}


def test_one_pair_can_be_overfitted_and_the_unet_stays_as_it_was(small_model: BaseModel) -> None:
    torch.manual_seed(0)
    adapter = new_adapter(small_model)
    before = {k: v.clone() for k, v in small_model.unet.state_dict().items()}
    processors = small_model.unet.attn_processors
    pair = part(random_batch(small_model, adapter), [0, 0])

    def draws(first: int) -> Iterator[TrainBatch]:
        for seed in count(first):
            other = random_batch(small_model, adapter, seed, 2)
            yield replace(pair, noise=other.noise, timesteps=other.timesteps)

    def fixed_loss(denoising: AdaptedUNet) -> float:
        with torch.no_grad():
            loss = sum(float(denoising.loss(draw)) for draw in islice(draws(1), 6)) / 6
        denoising.disable_adapter()
        return loss

    with adapt_unet(small_model, adapter) as denoising:
        start = fixed_loss(denoising)
        stream = train_steps(denoising, draws(100), optimizer=new_optimizer(adapter, 1e-2), steps=40)
        assert [p.step for p in stream] == list(range(1, 41))
        assert fixed_loss(denoising) < 0.95 * start
    assert all(torch.equal(v, before[k]) for k, v in small_model.unet.state_dict().items())
    assert small_model.unet.attn_processors == processors


def test_images_may_be_made_between_steps(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    from ipadapter_trainer.models.generate import generate

    plain = generate(base_model, None, prompts=["a red square"], image_features=None, steps=2)
    with adapt_unet(base_model, adapter) as denoising:
        for _ in train_steps(denoising, repeat(batch), optimizer=new_optimizer(adapter), steps=1):
            between = generate(base_model, None, prompts=["a red square"], image_features=None, steps=2)
    assert torch.equal(between, plain)


def test_accumulated_batches_are_one_large_batch(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    """The gradient of two half batches equals that of the whole."""

    def halves() -> Iterator[TrainBatch]:
        yield part(batch, [0, 1])
        yield part(batch, [2, 3])

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    twin = new_adapter(base_model)
    twin.load_state_dict(adapter.state_dict())
    prepared, optimizer = accelerator.prepare(adapter, torch.optim.SGD(adapter.parameters(), lr=1.0))
    with adapt_unet(base_model, prepared) as denoising:
        stream = train_steps(
            denoising, halves(), optimizer=optimizer, steps=1, accelerator=accelerator, max_grad_norm=0
        )
        (progress,) = stream
    assert progress.images == 4

    with adapt_unet(base_model, twin) as denoising:
        loss = denoising.loss(batch)
        loss.backward()
    torch.testing.assert_close(progress.loss, loss.detach())
    for weight, other in zip(adapter.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other - other.grad, atol=1e-6, rtol=1e-5)


def test_training_ends_with_its_batches(base_model: BaseModel, adapter: IPAdapter, batch: TrainBatch) -> None:
    with adapt_unet(base_model, adapter) as denoising:
        stream = train_steps(denoising, [batch] * 2, optimizer=new_optimizer(adapter), steps=9)
        assert len(list(stream)) == 2


def test_easy_timesteps_count_less_with_min_snr(base_model: BaseModel) -> None:
    """The weights of arXiv 2303.09556, from the schedule by hand."""
    timesteps = torch.tensor([0, 300, 999])
    predicted, target = torch.zeros(3, 4, 8, 8), torch.ones(3, 4, 8, 8)
    snr = base_model.scheduler.alphas_cumprod[timesteps] / (1 - base_model.scheduler.alphas_cumprod[timesteps])
    weights = Objective(base_model.scheduler, min_snr_gamma=5.0).sample_losses(predicted, target, timesteps)
    torch.testing.assert_close(weights, snr.clamp(max=5) / snr)


def test_init_from_starts_with_the_files_weights(base_model: BaseModel, adapter: IPAdapter, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter)
    again = new_adapter(base_model, init_from=tmp_path / "a.safetensors")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, adapter.state_dict()[name])
    assert all(p.requires_grad for p in again.parameters())
    with pytest.raises(TrainerError, match="its num_tokens is 4, this training's 8"):
        new_adapter(base_model, num_tokens=8, init_from=tmp_path / "a.safetensors")
    with pytest.raises(TrainerError, match="its kind is base, this training's plus"):
        new_adapter(base_model, TRAIN_KINDS["plus"], init_from=tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="no such file"):
        new_adapter(base_model, init_from=tmp_path / "absent.safetensors")


def test_a_loss_that_is_no_number_is_refused() -> None:
    assert check_loss(3, 0.5) == 0.5
    with pytest.raises(DivergedError, match=r"nan at step 3: .* lower learning_rate; .* checkpoint, if there is one"):
        check_loss(3, float("nan"))


def test_text_states_without_pooled_text_add_no_conditions() -> None:
    from ipadapter_trainer.models.conditioning import added_conditions

    assert added_conditions(TextStates(torch.zeros(1, 2, 3)), None) is None
