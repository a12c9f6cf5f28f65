"""Training in float16 with a loss scale. Accelerate scales on GPUs only, so these run PyTorch's own GradScaler for the
CPU in its place; everything else is what a GPU would run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ipadapter_trainer.errors import ConfigError, DivergedError
from ipadapter_trainer.files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.runtime.processes import check_precision, inference_dtype
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training import checks
from ipadapter_trainer.training import steps as adapt_unet
from ipadapter_trainer.training.adapted_unet import AdaptedUNet, TrainBatch
from ipadapter_trainer.training.train import Interrupted, train

from .test_cli import ipadapter, keys


class ScalingAccelerator(Accelerator):
    """What Accelerate makes of mixed_precision="fp16" on a GPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert self.mixed_precision == "fp16"
        assert self.scaler is None  # else this class is needed no more
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)


@pytest.fixture
def settings(settings: dict[str, Any], small_folder: Path) -> dict[str, Any]:
    """What these tests look at does not depend on the UNet, so it is a small one."""
    return {**settings, "base_model": str(small_folder)}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "Accelerator", ScalingAccelerator)
    monkeypatch.setattr(checks, "check_precision", lambda *_: None)


@dataclass
class Overflowing:
    """Numbers of the batches whose loss is so large that its gradients overflow, whatever the scale; and the adapter's
    weights before each batch.
    """

    batches: set[int] = field(default_factory=set[int])
    weights: list[Tensor] = field(default_factory=list[Tensor])


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> Overflowing:
    found, original = Overflowing(), AdaptedUNet.loss

    def loss(self: AdaptedUNet, batch: TrainBatch) -> Tensor:
        found.weights.append(torch.cat([p.detach().flatten().clone() for p in self.adapter.parameters()]))
        return original(self, batch) * (torch.inf if len(found.weights) in found.batches else 1.0)

    monkeypatch.setattr(AdaptedUNet, "loss", loss)
    return found


def fp16(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, "mixed_precision": "fp16", **changes}


def state_of(output: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = checkpoint_folders(Path(output))[-1]
    return torch.load(folder / STATE_FILE, weights_only=True), load_file(folder / ADAPTER_FILE)


def fresh() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def test_it_learns_what_float32_learns(settings: dict[str, Any], tmp_path: Path, scaling: None) -> None:
    """The adapter stays in float32, the base is in float16, and the losses are those of float32 but for rounding."""
    dtypes: set[torch.dtype] = set()
    losses: dict[str, list[float]] = {"fp16": [], "no": []}
    file = train(make_config(fp16(settings)), on_progress=lambda p: losses["fp16"].append(p.loss.item()))
    state, weights = state_of(settings["output"])
    dtypes = {weight.dtype for weight in weights.values()}
    assert dtypes == {torch.float32}
    assert all(weight.isfinite().all() for weight in load_file(file).values())
    assert state["scaler"]["scale"] > 2.0**12  # doubled after three steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "Accelerator", Accelerator)
        fresh()
        other = {**settings, "output": str(tmp_path / "float32")}
        train(make_config(other), on_progress=lambda p: losses["no"].append(p.loss.item()))
    assert losses["fp16"] == pytest.approx(losses["no"], rel=5e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedulefree"])
def test_a_step_that_overflows_is_none(
    optimizer: str, settings: dict[str, Any], scaling: None, overflowing: Overflowing
) -> None:
    """Neither weights nor optimizer, average, schedule and count move; the next batches make the step. "adamw" is
    fused: it skips inside of its own step.
    """
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(optimizer, "torch"))
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    changes: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rate, "max_grad_norm": 0}
    if optimizer == "adamw":
        changes |= {"ema_decay": 0.5, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    accumulated = changes.get("gradient_accumulation_steps", 1)
    train(make_config(fp16(settings, steps=1, **changes)))
    before, weights = state_of(settings["output"])
    # Of two steps to come the first overflows three times; the schedule rises to step 2 and falls to step 3.
    changes |= {"lr_warmup_steps": 2, "lr_scheduler": "cosine"} if optimizer == "adamw" else {}
    overflowing.batches |= set(range(accumulated + 1, 4 * accumulated + 1, accumulated))
    steps: list[tuple[int, int]] = []

    def watch(progress: adapt_unet.Progress) -> None:
        steps.append((progress.step, progress.batches))

    fresh()
    train(make_config(fp16(settings, steps=3, save_every=1, **changes)), on_progress=watch)
    assert steps == [(2, 4 * accumulated), (3, 5 * accumulated)]
    names = [folder.name for folder in checkpoint_folders(Path(settings["output"]))]
    assert names == ["checkpoint-000001", "checkpoint-000002", "checkpoint-000003"]
    before_batches = overflowing.weights[accumulated:]  # of the second training
    assert all(torch.equal(weight, before_batches[0]) for weight in before_batches[: 4 * accumulated])
    assert not torch.equal(before_batches[4 * accumulated], before_batches[0])
    after, moved = state_of(settings["output"])
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 8
    batches = before["position"]["batches"] + 5 * accumulated
    assert after["position"] == {"step": 3, "batches": batches, "images": 2 * batches}
    assert all(weight.isfinite().all() for weight in moved.values())
    assert any(not torch.equal(weights[name], moved[name]) for name in weights)
    (counted,) = {int(s["step"]) for s in after["optimizer"]["state"].values() if "step" in s} or {
        int(after["optimizer"]["param_groups"][0]["k"])
    }
    assert counted == 3
    if optimizer == "adamw":
        assert after["average"]["optimization_step"] == 3
        lines = [json.loads(line) for line in (Path(settings["output"]) / "log.jsonl").read_text().splitlines()]
        # Of the step to come; the skips do not take part.
        assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 1e-3, 0.0])
        assert all(line["loss"] < 10 for line in lines)


def test_overflows_without_end_stop_the_training(
    settings: dict[str, Any], scaling: None, overflowing: Overflowing
) -> None:
    overflowing.batches |= set(range(1, 100))
    with pytest.raises(DivergedError, match=r"overflowed in float16 30 times in a row after step 0\. Run it again"):
        train(make_config(fp16(settings)))
    assert checkpoint_folders(Path(settings["output"])) == []


def test_a_resumed_training_is_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, scaling: None, overflowing: Overflowing
) -> None:
    """The scale and its counter come from the checkpoint, and so do the batches that skipped steps took."""
    import signal

    overflowing.batches |= {2, 3}
    whole: list[float] = []
    parts: list[float] = []
    train(make_config(fp16(settings, output=tmp_path / "whole")), on_progress=lambda p: whole.append(p.loss.item()))
    settings |= {"output": str(tmp_path / "parts")}

    def stop(progress: adapt_unet.Progress) -> None:
        parts.append(progress.loss.item())
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    # Batches are counted from 1 again: the whole training took 8.
    overflowing.batches.clear()
    overflowing.batches |= {10, 11}
    fresh()
    with pytest.raises(Interrupted, match="checkpoint-000004"):
        train(make_config(fp16(settings)), on_progress=stop)
    fresh()
    train(make_config(fp16(settings)), on_progress=lambda p: parts.append(p.loss.item()))
    assert parts == whole
    (one, weights), (other, same) = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert one["scaler"] == other["scaler"]
    assert one["position"] == other["position"] == {"step": 6, "batches": 8, "images": 16}
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_validation_and_samples_in_float16(settings: dict[str, Any], scaling: None) -> None:
    folder = Path(settings["data"])
    for file in list(folder.glob("*.png")):
        for copy in ("a", "b"):
            (folder / f"{copy}-{file.name}").write_bytes(file.read_bytes())
            (folder / f"{copy}-{file.stem}.txt").write_text("a square")
    train(make_config(fp16(settings, steps=1, sample_images=1, sample_steps=2)))
    lines = [json.loads(line) for line in (Path(settings["output"]) / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["validation/loss"] < 10 for line in lines if "validation/loss" in line)
    assert (Path(settings["output"]) / "samples" / "step-000001.png").is_file()


@pytest.mark.parametrize("family", ["base_model", "sdxl_model"])
def test_the_vae_stays_in_float32(family: str, request: pytest.FixtureRequest) -> None:
    """In float16 its activations overflow, unless its config says that it is a fixed one."""
    model: BaseModel = request.getfixturevalue(family)
    folder = Path(model.unet.config["_name_or_path"]).parent
    half = load_base_model(folder, torch.float16)
    assert (half.vae_dtype, half.vae.dtype, half.unet.dtype) == (torch.float32, torch.float32, torch.float16)


def test_a_cpu_is_told_what_it_can_do(settings: dict[str, Any]) -> None:
    for command in (["train"], ["cache", f"cache={settings['output']}-cache"]):
        code, _, err = ipadapter(*command, *keys(settings, mixed_precision="fp16"))
        assert code == 2
        assert err.splitlines()[-1] == (
            "ipadapter: mixed_precision=fp16 needs a GPU, but this runs on the CPU. Set mixed_precision=no or bf16."
        )


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_gpu_without_bfloat16_is_told_of_float16(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no such GPU here: what PyTorch says of one is set."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    device = torch.device("cuda:0")
    for precision in ("no", "fp16", *(("bf16", "fp8") if capability == (8, 0) else ())):
        check_precision(precision, device)
    if capability == (7, 5):
        for precision in ("bf16", "fp8"):
            words = rf"mixed_precision={precision} needs bfloat16, .*\(Tesla T4\) lacks\. Set mixed_precision=fp16\."
            with pytest.raises(ConfigError, match=words):
                check_precision(precision, device)
    # And `generate` and `eval` take what the GPU has.
    assert inference_dtype(device) is (torch.bfloat16 if capability == (8, 0) else torch.float16)
    assert inference_dtype(torch.device("cpu")) is torch.float32
    for precision in ("no", "bf16", "fp8"):
        check_precision(precision, torch.device("cpu"))
