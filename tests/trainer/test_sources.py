"""The images that are held out of a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ipadapter_trainer.data.examples import Example, find_examples
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train
from ipadapter_trainer.training.training_data import held_out_rows

from .conftest import draw_image


def write_folder(folder: Path, styles: int, names: int) -> list[Example]:
    for style in range(styles):
        (folder / f"style-{style}").mkdir(parents=True)
        for name in range(names):
            draw_image("red").save(folder / f"style-{style}" / f"{name:04}.png")
            (folder / f"style-{style}" / f"{name:04}.txt").write_text(f"number {name}")
    return find_examples(folder)


def test_they_are_a_tenth_at_most_and_stay_the_same(tmp_path: Path) -> None:
    examples = write_folder(tmp_path / "a", styles=1, names=40)
    rows = held_out_rows(examples, 16, tmp_path / "a")
    assert len(rows) == 4
    assert held_out_rows(examples, 2, tmp_path / "a") < rows
    assert not held_out_rows(examples[:9], 16, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert held_out_rows(find_examples(tmp_path / "b"), 16, tmp_path / "b") == rows
    names = {examples[row].image for row in rows}
    fewer = [example for example in examples if example.image in names or int(Path(example.name).stem) % 3]
    kept = {fewer[row].image for row in held_out_rows(fewer, len(fewer) // 10, tmp_path / "a")}
    assert kept <= names


def test_the_same_name_in_every_folder_is_no_group(tmp_path: Path) -> None:
    """0001.png of five folders may show one thing five times; "another image" has to be another one."""
    examples = write_folder(tmp_path / "data", styles=5, names=20)
    captions = {examples[row].text for row in held_out_rows(examples, 10, tmp_path / "data")}
    assert len(captions) >= 6


def test_one_that_is_broken_does_not_stop_the_training(settings: dict[str, Any], images: Path) -> None:
    examples = write_folder(images, styles=1, names=20)
    for row in held_out_rows(examples, 16, images):
        Path(examples[row].name).write_bytes(b"no image")
    said: list[str] = []
    train(make_config(settings | {"steps": 1}), say=said.append)
    assert any("could not be read" in line for line in said)
