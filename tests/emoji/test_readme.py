"""The README says what is so: its Python runs, its commands exist, its numbers are the measured ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ipadapter_core.assets import MODEL, emoji_folder
from ipadapter_trainer.demo.emoji import load_images

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDER = emoji_folder()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder layout that the README assumes, filled with the emoji model."""
    adapters = tmp_path / "models" / "IP-Adapter" / "models"
    shutil.copytree(FOLDER / MODEL, tmp_path / "models" / "stable-diffusion-v1-5")
    shutil.copytree(FOLDER / MODEL / "image_encoder", adapters / "image_encoder")
    shutil.copy(FOLDER / "adapter.safetensors", adapters / "ip-adapter_sd15.safetensors")
    (tmp_path / "models" / "stable-diffusion-v1-5" / "tokenizer" / "special_tokens_map.json").write_text("{}")
    held_out = load_images(FOLDER / "pictures.zip", "held_out")
    Image.fromarray(held_out.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "cat.jpg")
    shutil.copy(tmp_path / "cat.jpg", tmp_path / "dog.jpg")
    return tmp_path


def test_the_python_examples_run(models: Path) -> None:
    """One after the other, as they are read."""
    example = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", example], cwd=models, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(models / "moon.png") as image:
        assert image.size == (64, 64)


def test_train_inspect_generate_as_written(models: Path) -> None:
    (block,) = (b for b in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "ipadapter train" in b)
    (models / "images").mkdir()
    for name in ("a", "b"):
        shutil.copy(models / "cat.jpg", models / "images" / f"{name}.jpg")
        (models / "images" / f"{name}.txt").write_text("a cat", encoding="utf-8")
    commands = block.replace("\\\n", " ").strip().splitlines()
    small = " resolution=64 batch_size=2 steps=2 save_every=2 num_workers=0 mixed_precision=no"
    assert [command.split()[1] for command in commands] == ["models", "data", "train", "inspect", "generate"]
    commands[2] += small  # the README's is for a real model
    for command in commands:
        run = f"{sys.executable} -m ipadapter_trainer.cli " + command.removeprefix("ipadapter ")
        done = subprocess.run(run, shell=True, cwd=models, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (models / "moon.png").is_file()


def test_the_quality_table_is_the_measured_one() -> None:
    quality = json.loads((FOLDER / "quality.json").read_text(encoding="utf-8"))
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in _table("How well it steers")}
    alone, mixed = quality["image_only"], quality["image_and_text"]
    columns = ("adapter", "weight_0", "shuffled_references")
    expected = {
        "closer to its own reference, by colour": [alone[c]["closer_by_histogram"] for c in columns],
        "closer to its own reference, by the vision model": [alone[c]["closer_by_clip"] for c in columns],
        "style is the reference's": [alone[c]["style"] for c in columns],
        "with another text: style is the reference's": [mixed[c]["style"] for c in columns],
        "with another text: concept is the text's": [mixed[c]["concept"] for c in columns],
    }
    for title, values in expected.items():
        assert table[title][:3] == [f"{value:.0%}" for value in values], title


def _table(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]
