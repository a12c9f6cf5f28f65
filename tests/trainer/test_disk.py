"""A disk that is full: a small tmpfs, where this process may mount one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ipadapter_trainer.cache.files import write_shard
from ipadapter_trainer.errors import DiskError, ExportError
from ipadapter_trainer.files.opening import checkpoint_folders
from ipadapter_trainer.files.writing import write_adapter
from ipadapter_trainer.runtime.disk import disk_errors, whole_file
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.run_log import RunLog, tracker_arguments
from ipadapter_trainer.training.steps import Progress
from ipadapter_trainer.training.train import train

from .test_cli import ipadapter, keys

FILE = "ip-adapter_context-32.safetensors"
FULL = (
    r"no space left on the disk \((needs [\d.]+ [KM]?B(ytes)?, )?[\d.]+ (bytes|KB|MB) free\)\. Free some space and run"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all of the disk but `leave` bytes, in whole pages."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
        stream.truncate(stream.tell() - leave)
    return filler


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def test_a_checkpoint_names_its_size_and_the_last_good_one(settings: dict[str, Any], disk: Path) -> None:
    settings |= {"output": str(disk / "run"), "save_every": 1, "keep_checkpoints": 99, "steps": 50}
    code, _, err = ipadapter("train", *keys(settings))
    last = checkpoint_folders(disk / "run")[-1]
    failed = f"checkpoint-{int(last.name.removeprefix('checkpoint-')) + 1:06d}"
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("ipadapter: ")]
    size = sum(file.stat().st_size for file in last.iterdir()) / 1000
    needed = float(line.partition("needs ")[2].partition(" KB")[0])
    assert needed == pytest.approx(size, rel=0.1)
    assert line.startswith(f"ipadapter: {disk / 'run' / failed}: no space left on the disk (needs ")
    assert line.endswith(f"Free some space and run the same command again; the last good checkpoint is {last.name}.")
    assert "Traceback" not in err
    assert not list((disk / "run").glob(".unfinished*"))
    # With room again, the same command resumes.
    for checkpoint in checkpoint_folders(disk / "run")[:-1]:
        for file in checkpoint.iterdir():
            file.unlink()
    code, out, err = ipadapter("train", *keys(settings, steps=int(last.name.removeprefix("checkpoint-")) + 1))
    assert code == 0, err
    assert f"Resuming from {last}" in out


def test_the_export_of_a_finished_training(settings: dict[str, Any], disk: Path) -> None:
    """The checkpoint is elsewhere on the disk already; the message has the command that makes the file of it."""
    settings |= {"output": str(disk / "run"), "steps": 1}
    config = make_config(settings)
    train(config)
    (disk / "run" / FILE).unlink()
    fill(disk, 3 * 4096)  # enough for the lock
    with pytest.raises(ExportError, match=FULL) as raised:
        train(config)  # only exports again
    (checkpoint,) = checkpoint_folders(disk / "run")
    command = f"ipadapter export {checkpoint} {disk / 'run' / FILE} --dtype=float32"
    assert str(raised.value).startswith(f"{disk / 'run' / FILE}: no space left on the disk (needs ")
    assert str(raised.value).endswith(f"The training is complete; its last checkpoint exports with `{command}`.")
    assert [p.name for p in (disk / "run").iterdir() if p.name.startswith((".", "ip-"))] == []
    (disk / "filler").unlink()
    code, _, err = ipadapter(*command.split()[1:])
    assert code == 0, err
    assert (disk / "run" / FILE).is_file()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_export_leaves_what_was_there(suffix: str, disk: Path, random_adapter: Callable[..., Any]) -> None:
    file = disk / f"a{suffix}"
    file.write_text("what was there")
    filler = fill(disk, 8192)
    with pytest.raises(DiskError, match=f"^{file}: {FULL}"):
        write_adapter(file, random_adapter("plus"), verify=False)
    assert sorted(disk.iterdir()) == sorted([file, filler])
    assert file.read_text() == "what was there"


def test_a_shard_of_a_cache(disk: Path) -> None:
    (disk / "images").mkdir()
    filler = fill(disk, 8192)
    file = disk / "images" / "shard-00000.safetensors"
    with pytest.raises(DiskError, match=f"^{file}: {FULL} the same command again; the shards that") as raised:
        write_shard(file, {"a": torch.zeros(10**5)}, {"flip": False}, {})
    assert "needs 400.2 KB" in str(raised.value)
    assert [p for p in disk.rglob("*") if p.is_file()] == [filler]


def test_a_generated_image(model_folder: Path, disk: Path) -> None:
    filler = fill(disk)
    settings = [f"base_model={model_folder}", "num_inference_steps=1", f"output={disk / 'o.png'}"]
    code, _, err = ipadapter("generate", *settings)
    assert (code, "Traceback" in err) == (2, False)
    assert f"ipadapter: {disk / 'o.png'}: no space left on the disk (" in err
    assert list(disk.iterdir()) == [filler]


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_log_is_not_worth_the_training(tracker: str, disk: Path) -> None:
    """One warning, no half line, and the log continues when there is room again."""
    said: list[str] = []
    accelerator = Accelerator(cpu=True, **tracker_arguments(tracker, disk))
    log = RunLog(accelerator, disk, {}, tracker, 0, warn=said.append)

    def steps(numbers: range) -> None:
        for step in numbers:
            log.add(Progress(step, torch.tensor(0.5), 8))
            log.write(1e-4)

    steps(range(1, 3))
    filler = fill(disk)
    steps(range(3, 60))
    log.image(59, "samples", noise(300))
    filler.unlink()
    steps(range(60, 62))
    log.image(61, "samples", noise(300))
    log.close()
    of_files = [line for line in said if "tensorboard" not in line]
    files = [str(disk / "log.jsonl"), str(disk / "samples" / "step-000059.png")]
    assert [line.split(": ")[1] for line in of_files] == files
    for line in of_files:
        assert "no space left on the disk (" in line
        assert line.endswith("free). The training continues; its log has a gap.")
    assert len(said) - len(of_files) <= 1
    logged = [json.loads(line)["step"] for line in (disk / "log.jsonl").read_text().splitlines()]
    assert logged == [*range(1, logged[-3] + 1), 60, 61]
    assert logged[-3] < 59
    assert [p.name for p in (disk / "samples").iterdir()] == ["step-000061.png"]


def test_the_outermost_file_is_named_and_other_errors_stay(tmp_path: Path) -> None:
    outer, inner = disk_errors(tmp_path / "checkpoint-1"), disk_errors(tmp_path / "inner")
    with pytest.raises(DiskError, match=r"checkpoint-1: Is a directory\. Check the disk and the path\.$"), outer, inner:
        tmp_path.read_bytes()
    with pytest.raises(RuntimeError, match="CUDA"), disk_errors(tmp_path / "a"):
        raise RuntimeError("CUDA error")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"half of it")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
