"""The log and the trackers as their own readers see them: TensorBoard's, wandb's folder, trackio's database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ipadapter_trainer.errors import ConfigError, DivergedError
from ipadapter_trainer.report.run_files import read_log, sample_files
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import load_config, make_config
from ipadapter_trainer.training import run_log as trackers
from ipadapter_trainer.training.run_log import RunLog, progress_postfix, tracker_arguments
from ipadapter_trainer.training.steps import Progress

CONFIG = {"base_model": "models/sd15", "steps": 100, "init_from": None, "learning_rate": 1e-05, "resume": True}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "cats"


@pytest.fixture
def open_log(output: Path) -> Callable[..., RunLog]:
    def open(log_with: str = "none", start: int = 0, config: dict[str, Any] | None = None) -> RunLog:
        accelerator = Accelerator(cpu=True, **tracker_arguments(log_with, output))
        return RunLog(accelerator, output, config or CONFIG, log_with, start)

    return open


def progress(step: int, loss: float = 0.5, norm: float | None = 2.0) -> Progress:
    return Progress(step, torch.tensor(loss), 8, None if norm is None else torch.tensor(norm))


def fill(log: RunLog, steps: range, validate_every: int = 2) -> None:
    for step in steps:
        log.add(progress(step, step / 10))
        log.write(1e-4)
        if step % validate_every == 0:
            log.validation(step, {"validation/loss": 0.5, "validation/gap_shuffled": step / 100})
            log.image(step, "samples", Image.new("RGB", (24, 16), (step, 0, 0)))
    log.close()


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_line_is_about_the_steps_since_the_one_before(output: Path, open_log: Callable[..., RunLog]) -> None:
    log = open_log()
    log.add(progress(1, 0.25, 1.0))
    log.add(progress(2, 0.75, 3.0))
    first = log.write(1e-4)
    log.add(progress(3, 2.0, None))
    second = log.write(5e-5)
    assert [first, second] == lines_of(output)
    assert (first["step"], first["loss"], first["grad_norm"], first["learning_rate"]) == (2, 0.5, 2.0, 1e-4)
    assert (second["step"], second["loss"], second["learning_rate"]) == (3, 2.0, 5e-5)
    assert "grad_norm" not in second
    assert first["images_per_second"] > 0
    assert 0.1 < first["memory_gb"] < 100  # of a process with PyTorch in it


def test_validation_is_no_training_time(output: Path, open_log: Callable[..., RunLog]) -> None:
    log = open_log()
    log.add(progress(1))
    log.write(1e-4)
    time.sleep(0.3)
    log.validation(1, {"validation/loss": 0.5})
    time.sleep(0.3)
    log.image(1, "samples", Image.new("RGB", (8, 8)))
    time.sleep(0.1)
    log.add(progress(2))
    time.sleep(0.1)  # the device may still be at work on it
    line = log.write(1e-4)
    assert 8 / 0.35 < line["images_per_second"] < 8 / 0.2
    assert lines_of(output)[1] == {"step": 1, "validation/loss": 0.5}


def test_what_a_killed_run_left_behind_is_dropped(output: Path, open_log: Callable[..., RunLog]) -> None:
    fill(open_log(), range(1, 8))
    with (output / "log.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    whole = [line["step"] for line in lines_of_readable(output)]
    assert whole == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    log = open_log(start=4)
    assert [line["step"] for line in lines_of(output)] == [1, 2, 2, 3, 4, 4]
    assert list(sample_files(output)) == [2, 4]
    fill(log, range(5, 8))
    assert [line["step"] for line in lines_of(output)] == whole
    training, validation = read_log(output)
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in validation] == [2, 4, 6]
    open_log(start=0)  # anew: not even step 0 stays
    assert read_log(output) == ([], [])


def lines_of_readable(output: Path) -> list[dict[str, float]]:
    training, validation = read_log(output)
    return sorted(training + validation, key=lambda line: line["step"])


def test_a_loss_that_is_no_number_ends_the_run(output: Path, open_log: Callable[..., RunLog]) -> None:
    log = open_log()
    log.add(progress(1, float("nan")))
    with pytest.raises(DivergedError, match="nan at step 1"):
        log.write(1e-4)
    assert lines_of(output) == []


def test_the_settings_can_be_used_again(settings: dict[str, Any], open_log: Callable[..., RunLog]) -> None:
    config = make_config({**settings, "sample_prompt": 'a "cat"\\ in Zürich 🐈', "min_snr_gamma": 5, "flip": True})
    open_log(config=config.model_dump(mode="json"))
    written = Path(settings["output"]).parent / "cats" / "config.toml"
    assert load_config(TrainConfig, written) == config


def test_the_progress_bar_says_the_essentials() -> None:
    line = {"step": 3, "loss": 0.123456, "images_per_second": 12.345, "memory_gb": 9.84}
    assert progress_postfix(line) == {"loss": "0.1235", "img/s": "12.3", "memory": "9.8 GB"}


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    events = tensorboard(output)
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tensorboard(output: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_reads_back_what_was_logged(output: Path, open_log: Callable[..., RunLog]) -> None:
    fill(open_log("tensorboard"), range(1, 5))
    found = scalars(output)
    assert found["train/loss"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert found["validation/gap_shuffled"] == [(2, 0.02), (4, 0.04)]
    assert {"train/learning_rate", "train/images_per_second", "train/memory_gb", "train/grad_norm"} <= found.keys()
    events = tensorboard(output)
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(2, 24, 16), (4, 24, 16)]
    (settings,) = events.Tensors("settings/text_summary")
    assert b'base_model = "models/sd15"' in settings.tensor_proto.string_val[0]
    assert [p.name for p in (output / "tensorboard").iterdir() if p.is_dir()] == []  # no run beside it


@pytest.mark.parametrize("start", [0, 4])
def test_a_resume_doubles_no_point_in_tensorboard(output: Path, open_log: Callable[..., RunLog], start: int) -> None:
    fill(open_log("tensorboard"), range(1, 8))
    time.sleep(1.1)  # its files are ordered by the second
    fill(open_log("tensorboard", start=start), range(start + 1, 8))
    found = scalars(output)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in found["validation/loss"]] == [2, 4, 6]
    assert [e.step for e in tensorboard(output).Images("samples")] == [2, 4, 6]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(trackers, "version", missing)
    with pytest.raises(ConfigError, match=rf"log_with={name} needs {name}.*pip install {name}.*log_with=none"):
        tracker_arguments(name, output)
    assert tracker_arguments("none", output) == {}


def test_every_tracker_of_the_settings_is_known(output: Path) -> None:
    from typing import get_args

    names = get_args(TrainConfig.model_fields["log_with"].annotation)
    assert set(names) == {"tensorboard", "wandb", "trackio", "none"}


OFFLINE = """
import socket, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from PIL import Image
from ipadapter_trainer.training.steps import Progress
from ipadapter_trainer.training.run_log import RunLog, tracker_arguments

def refused(self, address):
    if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"):
        return connect(self, address)
    print("NETWORK", address)
    raise OSError("no network")

connect, socket.socket.connect = socket.socket.connect, refused
output, tracker = Path(sys.argv[1]), sys.argv[2]
for start in (0, 2):
    accelerator = Accelerator(cpu=True, **tracker_arguments(tracker, output))
    log = RunLog(accelerator, output, {"steps": 4, "data": "images", "init_from": None}, tracker, start)
    for step in range(start + 1, 5):
        log.add(Progress(step, torch.tensor(step / 10), 8))
        log.write(1e-4)
        log.validation(step, {"validation/loss": 0.5})
        log.image(step, "samples", Image.new("RGB", (24, 16)))
    log.close()
if tracker == "trackio":
    import json
    from trackio.sqlite_storage import SQLiteStorage
    read = SQLiteStorage.get_metric_values
    runs = {run: read("ip-adapter-kit", run, "train/loss") for run in SQLiteStorage.get_runs("ip-adapter-kit")}
    print(json.dumps({run: [(v["step"], round(v["value"], 5)) for v in values] for run, values in runs.items()}))
"""


def run_offline(output: Path, tracker: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(output), tracker],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_trackio_needs_no_network(output: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    said = run_offline(output, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    assert "NETWORK" not in said
    runs = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert runs == {"cats": [[1, 0.1], [2, 0.2], [3, 0.3], [4, 0.4]], "cats from step 2": [[3, 0.3], [4, 0.4]]}
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 6


def test_wandb_needs_no_network(output: Path) -> None:
    pytest.importorskip("wandb")
    said = run_offline(output, "wandb", WANDB_MODE="offline")
    assert "NETWORK" not in said
    assert len(list((output / "wandb").glob("offline-run-*"))) == 2
    assert len(list((output / "wandb").rglob("*.png"))) == 6


def log_a_step(output: Path) -> None:
    accelerator = Accelerator(cpu=True, **tracker_arguments("tensorboard", output))
    log = RunLog(accelerator, output, CONFIG, "tensorboard", 0)
    log.add(Progress(1, torch.tensor(0.25 + accelerator.process_index / 2), 8))
    line = log.write(1e-4)
    (output / f"line-{accelerator.process_index}.json").write_text(json.dumps(line))
    log.close()
    accelerator.wait_for_everyone()  # the process group is still there
    accelerator.end_training()


def test_two_processes_write_one_log(output: Path) -> None:
    from accelerate import debug_launcher

    debug_launcher(log_a_step, (output,), num_processes=2)
    (line,) = lines_of(output)
    told = [json.loads((output / f"line-{i}.json").read_text()) for i in range(2)]
    assert line == told[0]
    assert line["loss"] == told[1]["loss"] == 0.5
    assert line["memory_gb"] == told[1]["memory_gb"]
    assert scalars(output)["train/loss"] == [(1, 0.5)]
