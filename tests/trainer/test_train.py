"""Whole trainings: exact resume, checkpoints that survive a kill, and files that every host loads."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipadapter_core import AdapterApplication, inject, load_adapter
from ipadapter_trainer.cache.write import write_cache
from ipadapter_trainer.errors import CheckpointError, ConfigError, DivergedError
from ipadapter_trainer.files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ipadapter_trainer.files.provenance import BASE_MODEL, DATA_SIZE, PREDICTION_TYPE, STEPS
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.models.generate import generate, initial_latents
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.steps import Progress
from ipadapter_trainer.training.train import Interrupted, train

from .conftest import training_settings, write_images
from .ldm import write_single_file
from .warm_python import WarmPython

Losses = list[tuple[int, float]]
FILE = "ip-adapter_context-32.safetensors"


@pytest.fixture
def settings(settings: dict[str, Any], small_folder: Path) -> dict[str, Any]:
    """What these tests look at does not depend on the UNet, so it is a small one."""
    return {**settings, "base_model": str(small_folder)}


@pytest.fixture(scope="module")
def one_step(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training after its first step, with the images and the other settings of `settings`."""
    folder = tmp_path_factory.mktemp("one_step")
    data = write_images(folder / "images")
    train(make_config({**training_settings(small_folder, data, folder / "run"), "steps": 1}))
    return folder / "run"


@pytest.fixture
def after_one_step(settings: dict[str, Any], one_step: Path) -> dict[str, Any]:
    """`settings`, whose first step is done."""
    shutil.copytree(one_step, settings["output"])
    return settings


def run(settings: dict[str, Any], **changes: Any) -> tuple[dict[str, torch.Tensor], Losses]:
    losses: Losses = []
    file = train(make_config({**settings, **changes}), on_progress=lambda p: losses.append((p.step, p.loss.item())))
    return load_file(file), losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "flip": True, "crop": "random", "noise_offset": 0.1},
        {"mixed_precision": "bf16", "ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"optimizer": "schedulefree", "lr_warmup_steps": 2},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"buckets": True, "bucket_step": 16, "kind": "plus", "gradient_checkpointing": True, "min_snr_gamma": 5.0},
    ],
    ids=["plain", "accumulated", "average", "schedule-free", "prodigy", "buckets"],
)
def test_a_resumed_training_is_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Bit for bit: 6 steps against 4 + 2 (Ctrl-C after the fourth), the draws crossing into another epoch."""
    for module in {"schedulefree": ["schedulefree"], "prodigy": ["prodigyopt"]}.get(changes.get("optimizer"), []):
        pytest.importorskip(module)
    settings = {**settings, **changes}
    whole, losses = run(settings, output=tmp_path / "whole")
    first: Losses = []

    def stop_after_four(progress: Progress) -> None:
        first.append((progress.step, progress.loss.item()))
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="checkpoint-000004"):
        train(make_config({**settings, "output": tmp_path / "parts"}), on_progress=stop_after_four)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(12345)  # whatever the new process did before
    rest, second = run(settings, output=tmp_path / "parts")
    assert first + second == losses
    assert [step for step, _ in second] == [5, 6]
    assert whole.keys() == rest.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, rest[name])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def test_another_seed_is_another_training(settings: dict[str, Any], tmp_path: Path) -> None:
    _, losses = run(settings, steps=1)
    _, again = run(settings, steps=1, output=tmp_path / "again")
    _, other = run(settings, steps=1, output=tmp_path / "other", seed=1)
    assert losses == again != other


def test_checkpoints_rotate_and_are_adapter_files(settings: dict[str, Any]) -> None:
    weights, _ = run(settings, save_every=1, keep_checkpoints=2)
    output = Path(settings["output"])
    assert [f.name for f in checkpoint_folders(output)] == ["checkpoint-000005", "checkpoint-000006"]
    assert sorted(p.name for p in output.iterdir()) == [
        "checkpoint-000005",
        "checkpoint-000006",
        "config.toml",
        FILE,
        "log.jsonl",
        "report.html",
    ]
    newest = load_file(output / "checkpoint-000006" / ADAPTER_FILE)
    assert all(torch.equal(weights[name], newest[name]) for name in weights)


def test_a_log_is_cut_back_to_the_checkpoint(settings: dict[str, Any]) -> None:
    run(settings, steps=2)
    log = Path(settings["output"]) / "log.jsonl"
    with log.open("a") as stream:
        stream.write('{"step": 3, "loss": 9.0, "images_per_second": 1.0}\n{"step": 4, "lo')
    run(settings, steps=3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["loss"] != 9.0


def test_epochs_are_counted_in_images(settings: dict[str, Any]) -> None:
    _, losses = run(settings, steps=None, epochs=0.5)
    assert [step for step, _ in losses] == [1, 2]  # 3 of 6 images, 2 a step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, "seed was 0 and is now 7"),
        ({"num_tokens": 8}, "num_tokens was 4 and is now 8"),
        ({"batch_size": 3}, "batch_size x processes was 2 and is now 3"),
        ({"optimizer": "schedulefree"}, "optimizer was adamw and is now schedulefree"),
        ({"crop": "random"}, "crop was center and is now random"),
        ({"resolution": 32}, "resolution was 64 and is now 32"),
        ({"resume": False}, "already holds checkpoint-000001"),
    ],
)
def test_another_training_does_not_resume(after_one_step: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        run(after_one_step, **changes)


def test_another_base_or_data_set_does_not_resume(after_one_step: dict[str, Any], v_model: BaseModel) -> None:
    settings = after_one_step
    (Path(settings["data"]) / "red.txt").write_text("another caption")
    with pytest.raises(CheckpointError, match=r"other images or captions \(6 .*accept_changes="):
        run(settings)
    v_folder = Path(v_model.unet.config["_name_or_path"]).parent
    with pytest.raises(CheckpointError, match=r"base_model was .*tiny-sd15.* is now .*tiny-v"):
        run(settings, base_model=v_folder)


def test_a_damaged_checkpoint_says_what_to_do(after_one_step: dict[str, Any]) -> None:
    (folder,) = checkpoint_folders(Path(after_one_step["output"]))
    (folder / STATE_FILE).write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(CheckpointError, match=r"damaged.*Delete"):
        run(after_one_step)


def test_the_learning_rate_may_change_at_a_resume(after_one_step: dict[str, Any]) -> None:
    before = load_file(checkpoint_folders(Path(after_one_step["output"]))[-1] / ADAPTER_FILE)
    after, _ = run(after_one_step, steps=2, learning_rate=1e-9)
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)


def test_a_resume_may_turn_to_a_cache_and_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its features are the images' rounded, so the training is the same one, though not bit for bit."""
    cache = write_cache(make_config({**settings, "cache": tmp_path / "cache"}))
    run(settings, steps=2)
    said: list[str] = []
    losses: Losses = []
    config = make_config({**settings, "steps": 4, "cache": cache})
    train(config, say=said.append, on_progress=lambda p: losses.append((p.step, p.loss.item())))
    change = "the features came from the images and now come from a cache of 1 variant"
    assert f"  {change}: the same training but for rounding" in said
    _, uncached = run(settings, steps=4, output=tmp_path / "uncached")
    assert [step for step, _ in losses] == [3, 4]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in uncached[2:]], rel=2e-2)
    said.clear()
    train(make_config({**settings, "steps": 5, "cache": cache}), say=said.append)
    assert not any("the features came from" in line for line in said)


def test_a_diverged_training_saves_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(DivergedError, match="lower learning_rate"):
        run(settings, learning_rate=1e30, max_grad_norm=0, steps=4)
    assert checkpoint_folders(Path(settings["output"])) == []


def test_unfit_settings_are_refused_before_the_weights_are_read(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(settings, output=tmp_path / "file")


def test_broken_images_are_counted_and_reported(settings: dict[str, Any]) -> None:
    (Path(settings["data"]) / "red.png").write_text("not an image")
    said: list[str] = []
    train(make_config(settings), say=said.append)
    assert any(line.startswith("1 images could not be read") and "red.png" in line for line in said)


KILLED_WHILE_SAVING = """
import os, sys, torch
import ipadapter_trainer.training.checkpoints as checkpoints
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train
import json
whole, calls = torch.save, []
def half(state, stream):
    calls.append(1)
    if len(calls) < 2:
        return whole(state, stream)
    stream.write(b"PK\\x03\\x04 half of it")
    stream.flush()
    os._exit(9)
torch.save = half
train(make_config(json.loads(sys.argv[1])))
"""


def test_a_kill_while_saving_leaves_the_last_good_checkpoint(
    settings: dict[str, Any], tmp_path: Path, warm_python: WarmPython
) -> None:
    whole, losses = run(settings, output=tmp_path / "whole")
    killed = warm_python.start(KILLED_WHILE_SAVING, [json.dumps({**settings, "save_every": 2})])
    _, err = killed.communicate()
    assert killed.returncode == 9, err
    output = Path(settings["output"])
    assert [f.name for f in checkpoint_folders(output)] == ["checkpoint-000002"]
    rest, second = run(settings)
    assert second == losses[2:]
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert not list(output.glob(".unfinished*"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_trains_as_its_folder_does(
    family: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue({"sd15": "model_folder", "sdxl": "sdxl_folder"}[family])
    settings |= {"image_encoder": str(folder / "image_encoder"), "kind": "plus", "steps": 2}
    file = write_single_file(folder, tmp_path / "base.safetensors", family)
    _, of_folder = run(settings, base_model=folder, output=tmp_path / "folder")
    _, of_file = run(settings, base_model=file, base_config=folder, output=tmp_path / "file")
    assert of_file == of_folder


def test_fine_tuning_starts_from_a_published_file(settings: dict[str, Any], tmp_path: Path) -> None:
    """What another host wrote: the published keys in float16, without metadata."""
    weights, losses = run(settings, steps=4, output=tmp_path / "first")
    save_file({name: weight.half() for name, weight in weights.items()}, str(tmp_path / "published.safetensors"))
    _, tuned = run(settings, steps=1, init_from=tmp_path / "published.safetensors", output=tmp_path / "tuned")
    assert tuned[0][1] < losses[0][1]  # the same draws as the first step of the first training


FULL_DISK = """
import json, resource, signal, sys
from ipadapter_trainer.cli.errors import user_errors
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
settings = json.loads(sys.argv[1])
train(make_config({**settings, "steps": 1}))
# From here no file can grow beyond half of what a training.pt needs, as on a full disk.
size = next(__import__("pathlib").Path(settings["output"]).glob("checkpoint-*/training.pt")).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
with user_errors():
    train(make_config(settings))
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(settings: dict[str, Any], warm_python: WarmPython) -> None:
    full = warm_python.start(FULL_DISK, [json.dumps({**settings, "save_every": 2})])
    _, err = full.communicate()
    assert full.returncode not in (None, 0)
    assert "checkpoint-000002: File too large (needs " in err
    assert "run the same command again; the last good checkpoint is checkpoint-000001." in err
    output = Path(settings["output"])
    assert [f.name for f in checkpoint_folders(output)] == ["checkpoint-000001"]
    assert not list(output.glob(".unfinished*"))
    run(settings)
    assert checkpoint_folders(output)[-1].name == "checkpoint-000006"


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported adapter that has moved away from where it began."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "a.png")
    (data / "a.txt").write_text("red")
    settings = {"base_model": model_folder, "data": data, "output": folder / "run", "resolution": 64}
    short = {"steps": 3, "batch_size": 2, "num_workers": 0, "learning_rate": 1e-2, "log_with": "none"}
    train(make_config({**settings, **short, "export_dtype": "float32"}))
    return folder / "run"


def test_the_export_carries_its_provenance(trained: Path) -> None:
    adapter = load_adapter(trained / FILE)
    assert adapter.spec.kind == "base"
    assert adapter.metadata[BASE_MODEL] == "tiny-sd15"
    assert adapter.metadata[PREDICTION_TYPE] == "epsilon"
    assert (adapter.metadata[STEPS], adapter.metadata[DATA_SIZE]) == ("3", "1")
    assert not any(str(trained.parent) in value for value in adapter.metadata.values())


def test_diffusers_loads_the_export_and_says_the_same(trained: Path, model_folder: Path, base_model: BaseModel) -> None:
    """The published layout as diffusers' own loader reads it, one forward pass in each."""
    pipeline = diffusers_pipeline(load_base_model(model_folder), trained)
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, generator=generator)
    text, time = encode_prompts(base_model, ["a red square", ""]).states, torch.tensor([300, 700])
    with torch.no_grad():
        theirs = pipeline.unet(latents, time, text, added_cond_kwargs={"image_embeds": [embeds[:, None]]}).sample
        key_values = load_adapter(trained / FILE)(embeds)
        with inject(base_model.unet, AdapterApplication(key_values, rows=range(2))):
            ours = base_model.unet(latents, time, text).sample
        plain = base_model.unet(latents, time, text).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_diffusers_pipeline_makes_the_same_image(trained: Path, model_folder: Path, base_model: BaseModel) -> None:
    """Text and image prompt, guidance and its zero image, four steps: our short loop against the pipeline."""
    from diffusers import DDIMScheduler

    model = load_base_model(model_folder)
    pipeline = diffusers_pipeline(model, trained)
    pipeline.scheduler = DDIMScheduler.from_config(
        model.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_ip_adapter_scale(0.7)
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a red square",
        negative_prompt="blue",
        ip_adapter_image_embeds=[torch.stack([torch.zeros_like(embeds), embeds])],
        latents=initial_latents(model, 1, 5, 64),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    ours = generate(
        base_model,
        load_adapter(trained / FILE),
        prompts=["a red square"],
        negative_prompt="blue",
        image_features=(embeds,),
        weight=0.7,
        steps=4,
        guidance=3.0,
        seed=5,
    )
    torch.testing.assert_close(ours / 2 + 0.5, theirs, atol=1e-4, rtol=1e-4)


def diffusers_pipeline(model: BaseModel, folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoders[0],
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=model.image_processor,
        image_encoder=model.image_encoder,
        requires_safety_checker=False,
    )
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=FILE, local_files_only=True)
    return pipeline


def test_a_finished_training_only_exports_again(settings: dict[str, Any]) -> None:
    weights, _ = run(settings, steps=2)
    said: list[str] = []
    again = train(make_config({**settings, "steps": 1}), say=said.append)
    assert any("steps=1, but" in line and "checkpoint-000002 has already done 2" in line for line in said)
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(again).items())
    assert load_adapter(again).metadata[STEPS] == "2"
