"""What a resumed run may change, what it says of it, and which checkpoint it starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipadapter_core import load_adapter
from ipadapter_trainer.data.buckets import SampleIndex
from ipadapter_trainer.data.dataset import ImageDataset
from ipadapter_trainer.errors import CheckpointError, ConfigError
from ipadapter_trainer.files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ipadapter_trainer.files.provenance import IMAGES_SEEN
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import load_config, make_config
from ipadapter_trainer.training.checkpoints import Position
from ipadapter_trainer.training.checks import check_training, notes
from ipadapter_trainer.training.dry_run import dry_run
from ipadapter_trainer.training.resume import resume_at
from ipadapter_trainer.training.steps import Progress
from ipadapter_trainer.training.train import train

from .conftest import draw_image
from .tiny_models import COLOURS, write_model

STEPS = 4
NEW_EPOCH = "  the images or their order changed, so it goes on with a new epoch"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run of four steps that kept its checkpoints 2 and 4, in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "images").mkdir()
    for number in range(12):
        draw_image(list(COLOURS)[number % 6]).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"number {number}")
    settings = {
        "base_model": str(write_model(folder / "model")),
        "data": str(folder / "images"),
        "output": str(folder / "run"),
        "resolution": 64,
        "batch_size": 2,
        "steps": STEPS,
        "save_every": 2,
        "num_workers": 0,
        "log_with": "none",
        "log_every": 1,
        "learning_rate": 1e-3,
        "sample_images": 0,
    }
    train(make_config(settings))
    return settings


@pytest.fixture
def settings(finished: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same run, whose output and images may be changed."""
    for name in ("run", "images"):
        shutil.copytree(Path(finished["output"]).parent / name, tmp_path / name)
    return {**finished, "output": str(tmp_path / "run"), "data": str(tmp_path / "images")}


def told(settings: dict[str, Any], **changes: Any) -> list[str]:
    """What the dry run says of the resume."""
    lines = notes(check_training(make_config({**settings, "steps": STEPS + 2, **changes})), "Would resume")
    return [line for line in lines if not line.startswith("Warning: ")]


def add_image(settings: dict[str, Any]) -> None:
    draw_image("red").save(Path(settings["data"]) / "more.png")
    (Path(settings["data"]) / "more.txt").write_text("one more")


# ---- what changed


def test_every_change_that_matters_is_said_with_both_values(settings: dict[str, Any]) -> None:
    newest = f"{settings['output']}/checkpoint-000004"
    assert told(settings, steps=STEPS) == [f"Would resume from {newest}."]
    quiet = {"num_workers": 1, "log_every": 5, "save_every": 7, "keep_checkpoints": 9, "gradient_checkpointing": True}
    assert told(settings, steps=STEPS, **quiet) == [f"Would resume from {newest}."]
    start = f"{newest}/{ADAPTER_FILE}"
    changes = {"learning_rate": 1e-5, "image_dropout": 0.2, "ema_decay": 0.9, "min_snr_gamma": 5, "init_from": start}
    assert told(settings, **changes) == [
        f"Would resume from {newest}, with changes:",
        f"  init_from was unset and is now {start}, which has no effect on a resumed run; choose another output to "
        "start from it",
        "  steps was 4 and is now 6",
        "  learning_rate was 0.001 and is now 1e-05",
        "  ema_decay was 0 and is now 0.9",
        "  image_dropout was 0.05 and is now 0.2",
        "  min_snr_gamma was unset and is now 5",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flip": True}, "flip was false and is now true"),
        ({"crop": "random", "seed": 3}, "seed was 0 and is now 3; crop was center and is now random"),
        ({"reference_crop": 0.5}, "reference_crop was 1 and is now 0.5"),
        ({"validation_images": 0}, "validation_images was 1 and is now 0"),
        (
            {"buckets": True, "bucket_step": 16},
            "buckets was false and is now true; bucket_step was unset and is now 16",
        ),
        ({"batch_size": 4}, "batch_size x processes was 2 and is now 4"),
    ],
)
def test_other_draws_are_resumed_on_request_only(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        told(settings, **changes)
    assert f"checkpoint-000004 was trained on other data: {words}. Set it back; or add accept_changes=true" in str(
        refused.value
    )
    lines = told(settings, **changes, accept_changes=True)
    reordered = [NEW_EPOCH] * bool(changes.keys() - {"flip", "crop", "reference_crop"})
    assert lines[1:] == [f"  {word}" for word in words.split("; ")] + ["  steps was 4 and is now 6"] + reordered


def test_added_images_are_counted_and_may_be_accepted(settings: dict[str, Any]) -> None:
    """The adapter, the optimizer and the step count stay; the new checkpoints belong to the new data."""
    add_image(settings)
    with pytest.raises(CheckpointError, match="11 images to train on, now 12"):
        told(settings)
    more, said, steps = {"steps": STEPS + 2, "accept_changes": True}, list[str](), list[int]()

    def done(progress: Progress) -> None:
        steps.append(progress.step)

    file = train(make_config({**settings, **more}), say=said.append, on_progress=done)
    assert said[:2] == [
        f"Resuming from {settings['output']}/checkpoint-000004, with changes:",
        "  11 images to train on, now 12",
    ]
    assert steps == [5, 6]
    assert load_adapter(file).metadata[IMAGES_SEEN] == "12"
    assert told(settings) == [f"Would resume from {settings['output']}/checkpoint-000006."]


def test_images_seen_are_counted_through_another_batch_size(settings: dict[str, Any]) -> None:
    file = train(make_config({**settings, "steps": STEPS + 1, "batch_size": 4, "accept_changes": True}))
    assert load_adapter(file).metadata[IMAGES_SEEN] == str(4 * 2 + 4)


def test_another_kind_is_refused_even_on_request(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="kind was base and is now plus; num_tokens was 4 and is now 16"):
        told(settings, kind="plus", accept_changes=True)
    with pytest.raises(
        CheckpointError, match=r"optimizer was adamw and is now schedulefree.* init_from=\S*checkpoint-000004"
    ):
        told(settings, optimizer="schedulefree", accept_changes=True)


def test_fewer_steps_than_are_done_are_said(settings: dict[str, Any]) -> None:
    said: list[str] = []
    weights = load_file(next(Path(settings["output"]).glob("ip-adapter*.safetensors")))
    again = train(make_config({**settings, "steps": 3}), say=said.append)
    newest = f"{settings['output']}/checkpoint-000004"
    assert f"Warning: steps=3, but {newest} has already done 4: there is nothing to train, so its adapter is exported again. Raise steps to train on." in said  # fmt: skip  # noqa: E501
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(again).items())
    (warning,) = check_training(make_config({**settings, "steps": None, "epochs": 0.5})).warnings
    assert warning.startswith(f"epochs=0.5, but {newest} has already done as many, in 4 steps:")


# ---- epochs, and the order of the images


def test_epochs_are_counted_on_from_the_checkpoint(settings: dict[str, Any]) -> None:
    """11 images in batches of 2 are 6 batches an epoch, of which 4 are done."""
    changes = {"steps": None, "epochs": 3}
    assert check_training(make_config({**settings, **changes})).steps == 18
    accumulated = check_training(make_config({**settings, **changes, "gradient_accumulation_steps": 2}))
    assert accumulated.steps == 4 + 7
    # 4 of 6 batches of the first epoch are done: what is left of three is 7 of the 3 batches that an epoch has now.
    larger = check_training(make_config({**settings, **changes, "batch_size": 4, "accept_changes": True}))
    assert (larger.steps, larger.start_batches) == (4 + 7, 3)
    one = check_training(make_config({**settings, "steps": None, "epochs": 1, "batch_size": 4, "accept_changes": True}))
    assert one.steps == 4 + 1
    other_size = check_training(make_config({**settings, **changes, "resolution": 96, "accept_changes": True}))
    assert (other_size.steps, other_size.start_batches) == (18, 4)  # without buckets, the same order


def shown_rows(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[int, int]]:
    """(epoch, row) of every image that a training shows."""
    shown: list[tuple[int, int]] = []
    item = ImageDataset.__getitem__

    def spy(self: ImageDataset, index: Any) -> Any:
        if isinstance(index, SampleIndex):
            shown.append((index.epoch, index.row))
        return item(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", spy)
    train(make_config({**settings, **changes}))
    return shown


def test_another_batch_size_goes_on_with_a_new_epoch(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"steps": STEPS + 3, "batch_size": 4, "accept_changes": True}
    assert told(settings, **changes)[-1] == NEW_EPOCH
    epochs = {**changes, "steps": None, "epochs": 3}
    assert check_training(make_config({**settings, **epochs})).steps == STEPS + 7
    shown = shown_rows(settings, monkeypatch, **changes)
    assert check_training(make_config({**settings, **epochs})).steps == STEPS + 7  # the skipped batches are not done
    first = [row for epoch, row in shown if epoch == 1]
    assert len(first) == 12 and len(set(first)) == 11  # each of the 11 images; the last batch is filled up
    assert {epoch for epoch, _ in shown} <= {1, 2}  # batches are fetched ahead
    kept = shown_rows(
        {**settings, "output": settings["output"]},
        monkeypatch,
        steps=STEPS + 4,
        **{"batch_size": 4, "gradient_accumulation_steps": 2},
    )
    assert {epoch for epoch, _ in kept} >= {2}


def test_batches_of_a_stream_are_skipped_by_images() -> None:
    names = ("data", "validation_images", "shards", "seed", "buckets", "bucket_sizes", "batches_per_epoch")
    before = dict.fromkeys(names) | {"images_per_batch": 2}
    now = before | {"images_per_batch": 3}
    assert resume_at(Position(4, 4, 8), before, now) == (3, 0)
    assert resume_at(Position(4, 4, 8), before, before) == (4, 0)
    listed = now | {"images_per_batch": 2, "data": "listed", "images": 6, "batches_per_epoch": 3}
    assert resume_at(Position(4, 4, 8), before | {"images": None}, listed) == (6, 4 / 3)  # cached meanwhile


# ---- files and models of others


@pytest.mark.parametrize("name", ["config.toml", "report.html", "ip-adapter_context-32.safetensors"])
def test_a_file_that_no_training_wrote_is_not_replaced(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / name).write_text("mine")
    for door in (train, lambda config: dry_run(config, lambda line: None)):
        with pytest.raises(ConfigError, match=f"{name} would be replaced, .* choose another output"):
            door(make_config({**settings, "output": output}))
    assert (output / name).read_text() == "mine"


def test_the_written_config_repeats_the_run(settings: dict[str, Any]) -> None:
    written = load_config(TrainConfig, Path(settings["output"]) / "config.toml")
    assert written == make_config({**settings, "output": written.output, "data": written.data})
    more = {"gradient_checkpointing": True, "output": str(Path(settings["output"]).with_name("again"))}
    train(make_config({**settings, **more, "steps": 1}))
    again = load_config(TrainConfig, Path(more["output"]) / "config.toml", ["steps=2"])
    train(again)  # CUDA graphs are not demanded, which a CPU and gradient_checkpointing refuse
    assert len(checkpoint_folders(Path(more["output"]))) == 2


def test_other_encoders_are_resumed_with_on_request_only(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "other-model"
    shutil.copytree(settings["base_model"], model)
    for part, words in (("vae", "vae was model "), ("text_encoder", "text_encoders was model ")):
        file = next((model / part).glob("*.safetensors"))
        whole = file.read_bytes()
        save_file({name: 1.3 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            told(settings, base_model=model)
        assert told(settings, base_model=model, accept_changes=True)[1].startswith(f"  {words}")
        file.write_bytes(whole)
    assert len(told(settings, base_model=model)) == 2  # as before


# ---- which checkpoint


def test_an_older_checkpoint_starts_an_output_of_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its steps are those of the run it comes from; that run keeps its later checkpoint; the same command resumes."""
    chosen = Path(settings["output"]) / "checkpoint-000002"
    branch = tmp_path / "branch"
    config = make_config({**settings, "resume": chosen, "output": branch})
    said: list[str] = []
    file = train(config, say=said.append)
    assert f"Resuming from {chosen}." in said
    whole = load_file(next(Path(settings["output"]).glob("ip-adapter*.safetensors")))
    assert all(torch.equal(weight, whole[name]) for name, weight in load_file(file).items())
    assert [f.name for f in checkpoint_folders(Path(settings["output"]))] == ["checkpoint-000002", "checkpoint-000004"]
    assert [json.loads(line)["step"] for line in (branch / "log.jsonl").open() if '"loss"' in line] == [3, 4]
    again = told(settings, resume=chosen, output=branch)
    newest = branch / "checkpoint-000004"
    assert again[0] == f"Would resume from {newest}, the newest in output, not from resume={chosen}, with changes:"


def test_a_run_never_forks_inside_its_output(settings: dict[str, Any]) -> None:
    output = Path(settings["output"])
    with pytest.raises(CheckpointError) as refused:
        told(settings, resume=output / "checkpoint-000002")
    assert str(refused.value) == (
        f"{output} already goes on to checkpoint-000004. To train on from checkpoint-000002 choose another output, "
        f"such as output={output}-from-2; or delete checkpoint-000004."
    )
    newest = output / "checkpoint-000004"
    assert told(settings, resume=newest)[0] == f"Would resume from {newest}, with changes:"
    assert len(checkpoint_folders(output)) == 2


def test_what_is_no_checkpoint_is_named_with_those_that_are(settings: dict[str, Any], tmp_path: Path) -> None:
    output = Path(settings["output"])
    both = f"a folder: {output / 'checkpoint-000002'} or {output / 'checkpoint-000004'}."
    for wrong in (output, output / "checkpoint-000003"):
        with pytest.raises(CheckpointError, match=f"resume={wrong}: no complete checkpoint.*{both}"):
            told(settings, resume=wrong)
    with pytest.raises(CheckpointError, match="resume=maybe: no complete checkpoint"):
        told(settings, resume="maybe")
    done = output / "checkpoint-000004"
    with pytest.raises(CheckpointError, match="Raise steps to train on, or write its adapter with `ipadapter export"):
        told(settings, resume=done, steps=STEPS, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_named_before_the_start(settings: dict[str, Any]) -> None:
    """The dry run sees it too; what is said is what to do with a file that was never downloaded."""
    output = Path(settings["output"])
    for name, before in (("checkpoint-000004", "resume from checkpoint-000002"), ("checkpoint-000002", "start again")):
        file = output / name / "adapter.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        words = rf"adapter\.safetensors: damaged \(truncated: .*\)\. Delete {output / name} to {before}\."
        with pytest.raises(CheckpointError, match=words):
            told(settings)
        with pytest.raises(CheckpointError, match=words):
            train(make_config({**settings, "steps": STEPS + 1}))
        shutil.rmtree(output / name)


def test_an_incomplete_checkpoint_is_neither_skipped_nor_written_over(settings: dict[str, Any]) -> None:
    older, newest = checkpoint_folders(Path(settings["output"]))
    (older / STATE_FILE).unlink()
    assert told(settings, steps=STEPS) == [f"Would resume from {newest}."]  # the newest one is whole
    (newest / STATE_FILE).unlink()
    shutil.rmtree(older)
    start = f"init_from={newest / ADAPTER_FILE}, which starts a new run from its weights"
    for resume in (True, False):
        with pytest.raises(CheckpointError) as refused:
            told(settings, resume=resume)
        assert str(refused.value) == (
            f"{newest}: training.pt is missing, so it cannot be resumed. Move it away to start again; or choose "
            f"another output with {start}."
        )
    newest.rename(newest.with_name("moved-away"))
    (newest.with_name(f".unfinished-{newest.name}-0a") / ADAPTER_FILE).mkdir(parents=True)  # of a crash
    assert told(settings) == []


def test_a_checkpoint_without_weights_may_be_moved_away(settings: dict[str, Any]) -> None:
    older, newest = checkpoint_folders(Path(settings["output"]))
    (newest / ADAPTER_FILE).unlink()
    words = f"{newest}: {ADAPTER_FILE} is missing, so it cannot be resumed. Move it away to resume from {older.name}."
    with pytest.raises(CheckpointError, match=f"^{words}$"):
        told(settings)


def test_a_checkpoint_without_settings_is_resumed_on_request_only(settings: dict[str, Any]) -> None:
    """Earlier versions stored them as `facts`, under other names."""
    folder = Path(settings["output"]) / "checkpoint-000004"
    content = torch.load(folder / "training.pt", weights_only=True)
    content["facts"] = content.pop("settings")
    torch.save(content, folder / "training.pt")
    unknown = "an earlier version wrote it, so its settings cannot be compared with those of this run"
    with pytest.raises(CheckpointError) as refused:
        told(settings)
    assert str(refused.value) == (
        f"{folder}: {unknown}. If they are the same, add accept_changes=true to resume; or choose another output with "
        f"init_from={folder / ADAPTER_FILE}, which starts a new run from its weights."
    )
    assert told(settings, accept_changes=True) == [f"Would resume from {folder}, with changes:", f"  {unknown}"]
    train(make_config({**settings, "accept_changes": True, "steps": STEPS + 1}))
    assert checkpoint_folders(Path(settings["output"]))[-1].name == f"checkpoint-{STEPS + 1:06d}"


def test_an_output_inside_the_data_is_refused(settings: dict[str, Any]) -> None:
    for output in (Path(settings["data"]), Path(settings["data"]) / "runs" / "mine"):
        with pytest.raises(ConfigError, match=rf"output {output} is inside data {settings['data']}"):
            told(settings, output=output)


def test_an_output_with_earlier_checkpoints_is_not_the_one_that_was_meant(settings: dict[str, Any]) -> None:
    output = Path(settings["output"])
    elsewhere = shutil.copytree(output, output.with_name("elsewhere"))
    with pytest.raises(
        CheckpointError, match=r"run holds checkpoint-000004, which is not later than resume=\S*elsewhere"
    ):
        told(settings, resume=elsewhere / "checkpoint-000004")


@pytest.mark.parametrize(("given", "found"), [("true", True), ("false", False), ("runs/a", Path("runs/a"))])
def test_resume_is_a_truth_value_or_a_folder(given: str, found: bool | Path, tmp_path: Path) -> None:
    assert (
        load_config(TrainConfig, None, ["base_model=a", "data=b", "output=c", "steps=1", f"resume={given}"]).resume
        == found
    )
    with pytest.raises(ConfigError, match="resume = 5: expected true, false or a checkpoint folder"):
        make_config({"base_model": "a", "data": "b", "output": "c", "steps": 1, "resume": 5})
