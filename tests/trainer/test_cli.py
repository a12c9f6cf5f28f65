"""The command as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ipadapter_trainer.cli import app
from ipadapter_trainer.engine.denoiser import new_adapter
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.training.checkpoints import checkpoint_folders
from PIL import Image
from typer.testing import CliRunner

from ipadapter_core import save_adapter

Start = Callable[..., "subprocess.Popen[str]"]


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def keys(settings: dict[str, Any], **changes: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


@pytest.fixture
def adapter_file(base_model: BaseModel, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "a.safetensors", new_adapter(base_model))
    return tmp_path / "a.safetensors"


def test_help_is_instant_and_lists_the_commands(run_ipadapter: Start) -> None:
    process = run_ipadapter("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert all(name in out for name in ("train", "generate", "inspect", "demo"))


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'pydantic'}"
    code = f"import sys, ipadapter_trainer.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_version() -> None:
    code, out, _ = ipadapter("--version")
    assert (code, out.split()[0]) == (0, "ip-adapter-kit")


def test_train_with_a_file_and_overrides(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    code, out, err = ipadapter("train", file, "steps=2")
    assert code == 0, err
    assert "M parameters" in out
    assert "6 pictures" in out
    assert f"Saved {Path(settings['output']) / 'ip-adapter_context-32.safetensors'}" in out
    assert f"Report: {Path(settings['output']) / 'report.html'}" in out
    code, out, _ = ipadapter("train", file, "steps=3")
    assert "Resuming from" in out
    assert "2 to 3" in out


def test_a_dry_run_says_what_it_needs_and_writes_nothing(settings: dict[str, Any]) -> None:
    code, out, err = ipadapter("train", "--dry-run", *(f"{key}={value}" for key, value in settings.items()))
    assert code == 0, err
    for words in ("0.05 M trained", "6 pictures to train on", "GFLOPs a step", "memory", "6 of 2 pictures"):
        assert words in out
    assert not Path(settings["output"]).exists()
    code, _, err = ipadapter("train", "--dry-run", *(f"{k}={v}" for k, v in {**settings, "data": "nowhere"}.items()))
    assert (code, "nowhere: no such file or folder" in err) == (2, True)


def test_options_are_listed() -> None:
    code, out, _ = ipadapter("train", "--options")
    assert code == 0
    assert "learning_rate (0.0001)" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rat": "1"}, "did you mean 'learning_rate'?"),
        ({"steps": "many"}, "steps = 'many': expected a whole number"),
        ({"base_model": "/nowhere"}, "/nowhere: no such folder"),
        ({"data": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"image_encoder": "/nowhere"}, "no image encoder there"),
        ({"init_from": "/nowhere.safetensors"}, "/nowhere.safetensors: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(settings: dict[str, Any], changes: dict[str, str], words: str) -> None:
    code, _, err = ipadapter("train", *keys(settings, **changes))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["a.toml", "b.toml"], ["steps=3", "a.toml"]])
def test_train_says_how_it_is_called(arguments: list[str]) -> None:
    code, _, err = ipadapter("train", *arguments)
    assert code == 2
    assert "at most one file" in err


def test_generate_writes_pictures(model_folder: Path, adapter_file: Path, pictures: Path, tmp_path: Path) -> None:
    common = ["generate", "--base-model", model_folder, "--steps", "2"]
    prompt = ["--adapter", adapter_file, "--image", pictures / "red.png", "--prompt", "a red square"]
    code, _, err = ipadapter(*common, *prompt, "--count", "2", "--output", tmp_path / "new" / "o.png")
    assert code == 0, err
    assert [Image.open(tmp_path / "new" / f"o-{i}.png").size for i in (1, 2)] == [(64, 64)] * 2
    code, out, _ = ipadapter(*common, "--output", tmp_path / "plain.png")
    assert (code, out.strip()) == (0, f"Saved {tmp_path / 'plain.png'}")


def test_generate_names_what_is_wrong(model_folder: Path, adapter_file: Path, pictures: Path, tmp_path: Path) -> None:
    common = ["generate", "--base-model", model_folder, "--output", tmp_path / "o.png"]
    image = ["--image", pictures / "red.png"]
    cases: list[tuple[list[Any], str]] = [
        (["--adapter", adapter_file], "--image is missing"),
        (image, "--adapter is missing"),
        (["--adapter", pictures / "red.png", *image], "PNG image"),
        (["--adapter", adapter_file, "--image", adapter_file], "a safetensors file; expected an image"),
        (["--adapter", adapter_file, "--image", "/nowhere.png"], "/nowhere.png: no such picture"),
        (["--output", tmp_path / "o.xyz"], "unknown picture suffix"),
        (["--size", "60"], "multiple of 8"),
    ]
    for arguments, words in cases:
        code, _, err = ipadapter(*common, *arguments)
        assert (code, "Traceback" in err) == (2, False)
        assert words in err


def test_inspect(adapter_file: Path, pictures: Path) -> None:
    code, out, _ = ipadapter("inspect", adapter_file)
    assert code == 0
    for words in ("base", "16 cross-attention layers", "tokens", "float32", "ipadapter.kind"):
        assert words in out
    code, out, _ = ipadapter("inspect", adapter_file, "--json")
    described = json.loads(out)
    assert (described["kind"], described["tokens"], described["layers"]) == ("base", 4, 16)
    assert described["parameters"] == sum(4 * 32 * n for n in (24, 1)) + 2 * 32 + 2 * 32 * sum(
        described["layer_widths"]
    )
    for wrong in (pictures / "red.png", Path("/nowhere.safetensors")):
        code, _, err = ipadapter("inspect", wrong)
        assert code == 2
        assert str(wrong) in err


def test_ctrl_c_saves_and_says_how_to_go_on(settings: dict[str, Any], run_ipadapter: Start) -> None:
    process = run_ipadapter("train", *keys(settings, steps=100000, workers=1))
    log = Path(settings["output"]) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    (folder,) = checkpoint_folders(Path(settings["output"]))
    assert f"Stopped; saved {folder}. Run the same command again to resume." in err
    done = int(folder.name.removeprefix("checkpoint-"))
    code, out, _ = ipadapter("train", *keys(settings, steps=done + 1, workers=0))
    assert code == 0
    assert f"Resuming from {folder}" in out
    assert f"{done:,} to {done + 1:,}" in out


def test_the_training_survives_a_run_without_main_thread(settings: dict[str, Any]) -> None:
    """Signals belong to the main thread; a program that trains in another one must still work."""
    from threading import Thread

    from ipadapter_trainer.settings.config_file import make_config
    from ipadapter_trainer.training.train import train

    files: list[Path] = []
    thread = Thread(target=lambda: files.append(train(make_config({**settings, "steps": 1}))))
    thread.start()
    thread.join()
    assert files[0].is_file()
