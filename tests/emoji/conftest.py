"""What the tests of the bundled model share: the examples of the documentation run in this process."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ipadapter_core.assets import emoji_folder
from ipadapter_trainer.cli import app
from ipadapter_trainer.demo.emoji import EmojiImages, load_images

from ..training_fixtures import fresh_accelerator, one_thread  # noqa: F401 -- used by every test

# Defaults that take a CPU minutes, in few steps.
TRAIN = ("steps=2", "num_workers=0", "sample_steps=2")
FEW_STEPS = {"train": TRAIN, "cache": TRAIN, "generate": ("num_inference_steps=4",)}


@pytest.fixture(scope="session")
def train_images() -> EmojiImages:
    """The bundled images to train on: decoding them takes a second."""
    return load_images(emoji_folder() / "pictures.zip", "train")


@pytest.fixture(scope="session")
def held_out() -> EmojiImages:
    """The bundled images that no training saw."""
    return load_images(emoji_folder() / "pictures.zip", "held_out")


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run `ipadapter ...` as it is written, with few steps, in a folder. It has to succeed."""

    def run(command: str, folder: Path, *changes: str) -> None:
        program, *words = shlex.split(command)
        assert program == "ipadapter"
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, [*words, *FEW_STEPS.get(words[0], ()), *changes])
        assert result.exit_code == 0, f"{command}\n{result.stderr}\n{result.exception!r}"

    return run


@pytest.fixture
def run_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Run an example as it is written, in a folder; diffusers' pipelines take 4 steps instead of their default, 50."""

    def run(example: str, folder: Path) -> None:
        monkeypatch.chdir(folder)
        in_few_steps = re.sub(r"(?<=, )(?=ip_adapter_image)", "num_inference_steps=4, ", example)
        assert in_few_steps != example or "pipeline(" not in example  # else 50 steps, and nobody would notice
        exec(compile(in_few_steps, "example.py", "exec"), {"__name__": "__main__"})  # noqa: S102

    return run
