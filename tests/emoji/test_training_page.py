"""docs/training.md says what is so: its commands are understood, its first ones and its Python run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from PIL import Image

from ipadapter_core.assets import MODEL, emoji_folder
from ipadapter_trainer.cli import app
from ipadapter_trainer.data.examples import find_examples
from ipadapter_trainer.data.face_embeds import with_faces
from ipadapter_trainer.models.published_models import models_of
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import config_of_arguments
from ipadapter_trainer.settings.eval_config import EvalConfig
from ipadapter_trainer.settings.fields import Config
from ipadapter_trainer.settings.generate_config import GenerateConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
BLOCKS, PYTHON = ([text for found, text in FENCED if found == language] for language in ("", "python"))
FOLDER = emoji_folder()
MODELS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "cache": TrainConfig,
    "generate": GenerateConfig,
    "eval": EvalConfig,
}


def commands() -> list[list[str]]:
    """The words after `ipadapter`, of every command in a block, a launcher's as well."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^ipadapter|-m ipadapter_trainer\.cli) (.*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout is needed
    root: Any = typer.main.get_command(app)
    assert {words[0] for words in commands()} >= {
        "models",
        "data",
        "train",
        "cache",
        "inspect",
        "export",
        "generate",
        "eval",
    }
    for words in commands():
        command, rest = root, words
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        values, _, _ = command.make_parser(command.make_context(words[0], [], resilient_parsing=True)).parse_args(rest)
        if words[0] in MODELS:
            config_of_arguments(MODELS[words[0]], words[0], values["arguments"])
        if words[0] == "models":
            assert models_of(values["names"])


def test_the_first_commands_run_as_written(run_command: Callable[..., None], tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "emoji-base" in block)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    unpack, *rest = block.replace("\\\n", " ").strip().splitlines()
    subprocess.run(unpack.replace("python ", f"{sys.executable} ", 1), shell=True, cwd=tmp_path, check=True)
    rows = (tmp_path / "emoji-images" / "metadata.jsonl").read_text().splitlines()
    # A few of the images are enough: minutes become seconds.
    (tmp_path / "emoji-images" / "metadata.jsonl").write_text("\n".join(rows[::30]))
    kept = {json.loads(row)["file_name"] for row in rows[::30]}
    for row in rows:
        if (name := json.loads(row)["file_name"]) not in kept and name not in block:
            (tmp_path / "emoji-images" / name).unlink()
    for command in rest:
        run_command(command, tmp_path)
    assert (tmp_path / "runs" / "emoji" / "report.html").is_file()
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (128, 128)


INSIGHTFACE = {
    "__init__.py": "",
    "app.py": """
import numpy as np
from types import SimpleNamespace
class FaceAnalysis:
    def __init__(self, name): pass
    def prepare(self, ctx_id): pass
    def get(self, image):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        if image[0, 0, 2] > 200:  # red, for it comes as BGR
            return []
        return [SimpleNamespace(normed_embedding=np.full(512, 512**-0.5, np.float32), kps=np.zeros((5, 2)))]
""",
    "utils/__init__.py": "",
    "utils/face_align.py": "def norm_crop(image, landmark, image_size): return image[:image_size, :image_size]",
}


def test_the_script_for_faces_writes_what_a_training_reads(tmp_path: Path) -> None:
    """With a stand-in for insightface, whose models have to be downloaded."""
    for name, text in INSIGHTFACE.items():
        (tmp_path / "insightface" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "insightface" / name).write_text(text)
    (tmp_path / "photos").mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (300, 250), colour).save(tmp_path / "photos" / f"{colour}.jpg")
        (tmp_path / "photos" / f"{colour}.txt").write_text(f"{colour} person\n")
    (script,) = (block for block in PYTHON if "insightface" in block)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    examples = with_faces(find_examples(tmp_path / "photos"), tmp_path / "faces.safetensors", tmp_path / "photos")
    assert [example.text for example in examples] == ["blue person", "green person"]  # no face, no row
    with Image.open(examples[0].references[0]) as face:
        assert face.size == (224, 224) and face.getpixel((0, 0))[2] > 200
    assert json.loads((tmp_path / "photos" / "metadata.jsonl").read_text().splitlines()[0])["file_name"] == "blue.jpg"


def test_the_adapter_goes_into_diffusers_as_written(run_python: Callable[[str, Path], None], tmp_path: Path) -> None:
    (example,) = (block for block in PYTHON if "load_ip_adapter" in block)
    shutil.copytree(FOLDER / MODEL, tmp_path / "models" / "stable-diffusion-v1-5")
    shutil.copytree(FOLDER / MODEL / "image_encoder", tmp_path / "models" / "IP-Adapter" / "models" / "image_encoder")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    shutil.copy(FOLDER / "adapter.safetensors", tmp_path / "runs" / "mine" / "ip-adapter_sd15.safetensors")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 64), "orange").save(tmp_path / "images" / "cat.jpg")
    run_python(example, tmp_path)
    with Image.open(tmp_path / "moon.png") as image:
        assert image.size == (128, 128)
