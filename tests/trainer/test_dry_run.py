"""What a training would need, counted without a weight: beside published counts, and beside a real step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ipadapter_trainer.cli import app
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import TextStates
from ipadapter_trainer.models.features import Features
from ipadapter_trainer.models.frozen import recompute_activations
from ipadapter_trainer.models.prepare_unet import prepare_unet
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import TrainBatch, adapt_unet
from ipadapter_trainer.training.cost import Meter, metered, step_cost
from ipadapter_trainer.training.dry_run import Plan
from ipadapter_trainer.training.new_adapter import adapter_spec, new_adapter

from .plans import plan_of
from .tiny_models import EMBEDS, LENGTH

pytestmark = pytest.mark.usefixtures("shared_counts")

CONFIGS = Path(__file__).parents[2] / "configs"


def settings_of(base: Path, data: Path | str = "unused", **settings: object) -> TrainConfig:
    given = {"base_model": base, "data": str(data), "output": "unused", "steps": 10, "batch_size": 1}
    return TrainConfig(**given | settings)  # type: ignore[arg-type]


# ---- the meter


def test_the_meter_counts_products_and_what_is_alive_at_once() -> None:
    layers = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30)).to("meta")
    x = torch.zeros(5, 10, device="meta")
    with torch.no_grad(), metered([x, *layers.parameters()]) as meter:
        layers(x)
    assert meter.flops == 2 * 5 * (10 * 20 + 20 * 30)
    assert meter.peak_bytes == 4 * 5 * (20 + 30)
    with torch.no_grad(), metered([x, *layers.parameters()]) as meter:
        for _ in range(3):  # what is gone makes room
            layers(x)
            x.view(2, 25)  # no new storage
    assert meter.peak_bytes == 4 * 5 * (20 + 30)


@pytest.mark.parametrize("learns", ["q", "kv", "qkv"])
def test_fused_attention_is_counted_as_its_products(learns: str) -> None:
    """Two products forward; backward one for each gradient and one for the attention matrix's."""
    batch, heads, length, keys, width = 2, 3, 7, 5, 4
    q = torch.zeros(batch, heads, length, width, device="meta", requires_grad="q" in learns)
    k, v = (torch.zeros(batch, heads, keys, width, device="meta", requires_grad="k" in learns) for _ in "kv")
    product = 2 * batch * heads * length * keys * width
    with metered([q, k, v]) as meter:
        out = F.scaled_dot_product_attention(q, k, v)
        assert (out.shape, meter.flops) == (q.shape, 2 * product)
        out.sum().backward()
    assert meter.flops == (2 + len(learns) + 1) * product
    assert [x.grad is not None for x in (q, k, v)] == [name in learns for name in "qkv"]


@pytest.mark.parametrize("kind", ["base", "faceid"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_takes_what_was_counted(small_folder: Path, kind: str, checkpointing: bool) -> None:
    """The meter around a step of the training's own code, on the CPU with weights."""
    config = settings_of(
        small_folder, kind=kind, resolution=64, batch_size=4, gradient_checkpointing=checkpointing, cache="unused",
        sample_images=0,
    )  # fmt: skip
    base_model = load_base_model(small_folder)
    counted = step_cost(base_model, adapter_spec(base_model, TRAIN_KINDS[kind]), config)
    adapter = new_adapter(base_model, TRAIN_KINDS[kind])
    prepare_unet(base_model, fp8=False, gradient_checkpointing=checkpointing, compiled=False)
    if not checkpointing:
        recompute_activations(base_model.unet)  # as `prepare_unet` does on a GPU
    for parameter in adapter.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    features = Features(
        torch.randn(4, 4, 8, 8),
        TextStates(torch.randn(4, LENGTH, 32)),
        (torch.randn(4, 512 if kind == "faceid" else EMBEDS),),
    )
    batch = TrainBatch(features, torch.zeros(4), torch.randn(4, 4, 8, 8), torch.randint(1000, (4,)))
    meter = Meter([*base_model.unet.parameters(), *adapter.parameters()])
    with adapt_unet(base_model, adapter) as model, meter:
        model.loss(batch).backward()
        model.disable_adapter()
    assert counted.activation_bytes == pytest.approx(meter.peak_bytes, rel=0.1)


# ---- beside the published models


@pytest.mark.parametrize(
    ("family", "resolution", "forward", "both", "encoders"),
    [
        ("sd15", 512, 0.804, 1.670, 1.117 + 0.335 + 0.013),
        ("sdxl", 512, 1.592, 3.188, 1.117 + 0.335 + 0.111),
        ("sdxl", 1024, 6.766, 14.04, 4.879 + 0.335 + 0.111),
    ],
)
def test_the_work_is_that_of_the_original(
    family: str, resolution: int, forward: float, both: float, encoders: float, published: dict[str, Path]
) -> None:
    """TFLOPs an image, as PyTorch's counter has them for the original's code on the published shapes; the encoders
    are VAE, image and text.
    """
    config = settings_of(published[family], resolution=resolution, batch_size=2)
    base_model = load_base_model(published[family])
    cost = step_cost(base_model, adapter_spec(base_model, TRAIN_KINDS["base"]), config)
    assert cost.forward_flops / 2e12 == pytest.approx(forward, rel=0.01)
    assert cost.flops / 2e12 == pytest.approx(both, rel=0.025)
    assert cost.encoder_flops / 2e12 == pytest.approx(encoders, rel=0.01)


@pytest.fixture(scope="module")
def plans(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """SD1.5 at 512 px, with one setting after the other."""
    data = tmp_path_factory.mktemp("data")
    (data / "a.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' * 20)
    (data / "a.png").touch()
    half = {"mixed_precision": "bf16"}
    settings: dict[str, dict[str, object]] = {
        "float": {},
        "float, average": {"ema_decay": 0.999},
        "half": half,
        "eighth": {"mixed_precision": "fp8"},
        "twice": {**half, "batch_size": 2},
        "8-bit optimizer": {**half, "optimizer": "adamw8bit"},
        "frugal": {**half, "gradient_checkpointing": True},
        "frugal, samples": {**half, "gradient_checkpointing": True, "sample_images": 4},
        "no cache": {**half, "cache": None},
    }
    common = {"cache": "anywhere", "sample_images": 0}
    return {
        name: plan_of(settings_of(published["sd15"], data / "a.jsonl", **common | changes))
        for name, changes in settings.items()
    }


def test_memory_follows_the_settings(plans: dict[str, Plan]) -> None:
    def part(name: str, of: str) -> int:
        return plans[name].bytes[of]

    weights, adapter, activations = plans["float"].bytes
    trained, unet = plans["float"].trained, 859.5e6
    assert plans["half"].frozen == pytest.approx(unet, rel=1e-3)
    assert [part(name, weights) for name in ("float", "half", "eighth")] == pytest.approx(
        [4 * unet, 2 * unet, unet], rel=1e-3
    )
    assert part("float, average", adapter) - part("float", adapter) == 4 * trained
    assert part("half", adapter) - part("float", adapter) == 2 * trained  # autocast's copy
    assert part("half", adapter) - part("8-bit optimizer", adapter) == 6 * trained
    assert part("twice", activations) == pytest.approx(2 * part("half", activations), rel=0.02)
    assert part("half", activations) == pytest.approx(part("float", activations) / 2, rel=0.05)
    assert part("frugal", activations) < 0.35 * part("half", activations)
    assert part("frugal, samples", activations) > 2 * part("frugal", activations)  # the VAE comes back for them
    assert plans["frugal"].cost.flops == pytest.approx(1.30 * plans["half"].cost.flops, rel=0.02)
    assert plans["half"].cost.encoder_flops == 0
    encoders = 83.7e6 + 123.1e6 + 632.1e6  # VAE, CLIP ViT-L/14's text, ViT-H/14
    assert plans["no cache"].frozen - plans["half"].frozen == pytest.approx(encoders, rel=0.01)


def test_steps_follow_the_images(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' * 20)
    (tmp_path / "a.png").touch()
    config = settings_of(
        small_folder, tmp_path / "a.jsonl", resolution=64, batch_size=3, steps=None, epochs=4, cache="anywhere"
    )
    plan = plan_of(config)
    assert plan.examples == 18  # a tenth is held out
    assert plan.steps == 24


# ---- the command


def test_the_command_prints_and_writes_nothing(
    published: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    base = published["sdxl"]
    given = [f"base_model={base}", f"image_encoder={base / 'image_encoder'}", f"data={images}", "output=runs/mine"]
    result = CliRunner().invoke(app, ["train", str(CONFIGS / "sdxl-plus.toml"), *given, "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in (
        "423.75 M trained",
        "6 images to train on",
        "200,000 of 64 images: 12,800,000 images",
        "GFLOPs an image forward and backward",
        "memory      about",
        "runs/mine",
    ):
        assert words in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_as_training_would(published: dict[str, Path], images: Path) -> None:
    base = published["sd15"]
    given = [f"base_model={base}", f"data={images}", "output=unused", "steps=1"]
    for wrong, words in (
        ("kind=faceid", "face"),
        ("resolution=100", "expected a multiple of 8"),
        ("data=/nowhere", "/nowhere: no such file or folder"),
        ("image_encoder=/nowhere", "no image encoder there"),
    ):
        kept = [setting for setting in given if setting.partition("=")[0] != wrong.partition("=")[0]]
        result = CliRunner().invoke(app, ["train", *kept, wrong, "--dry-run"])
        assert (result.exit_code, "Traceback" in result.stderr) == (2, False)
        assert words in result.stderr


def test_a_model_knows_its_tokens(base_model: BaseModel, model_folder: Path) -> None:
    """Counted with the encoder's own patches, not with those of ViT-H/14."""
    config = settings_of(model_folder, kind="plus", resolution=64, cache="unused", sample_images=0)
    spec = adapter_spec(base_model, TRAIN_KINDS["plus"])
    adapter = new_adapter(base_model, TRAIN_KINDS["plus"])
    states = torch.zeros(1, base_model.image_tokens, base_model.hidden_dim)
    with FlopCounterMode(display=False) as flops:
        adapter(states)
    unet_alone = step_cost(base_model, adapter_spec(base_model, TRAIN_KINDS["base"]), config).forward_flops
    more = step_cost(base_model, spec, config).forward_flops - unet_alone
    assert 0 < more < 2 * flops.get_total_flops()
