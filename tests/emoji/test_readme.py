"""The README and docs/python.md: the Python runs, the commands exist, the numbers are measured, no link is dead."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ipadapter_core.assets import MODEL, emoji_folder
from ipadapter_trainer.demo.emoji import EmojiImages

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDER = emoji_folder()


@pytest.fixture
def models(tmp_path: Path, held_out: EmojiImages) -> Path:
    """The folder layout that the README assumes, filled with the emoji model."""
    adapters = tmp_path / "models" / "IP-Adapter" / "models"
    shutil.copytree(FOLDER / MODEL, tmp_path / "models" / "stable-diffusion-v1-5")
    shutil.copytree(FOLDER / MODEL / "image_encoder", adapters / "image_encoder")
    shutil.copy(FOLDER / "adapter_base.safetensors", adapters / "ip-adapter_sd15.safetensors")
    shutil.copy(FOLDER / "adapter.safetensors", adapters / "ip-adapter-plus_sd15.safetensors")
    (tmp_path / "models" / "stable-diffusion-v1-5" / "tokenizer" / "special_tokens_map.json").write_text("{}")
    Image.fromarray(held_out.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "cat.jpg")
    shutil.copy(tmp_path / "cat.jpg", tmp_path / "dog.jpg")
    return tmp_path


def test_the_python_examples_run(models: Path, run_python: Callable[[str, Path], None]) -> None:
    """Those of docs/python.md continue the one of the README."""
    examples = re.findall(r"```python\n(.*?)```", README + PYTHON_PAGE, re.DOTALL)
    assert len(examples) == 5
    run_python("\n".join(examples), models)
    with Image.open(models / "moon.png") as image:
        assert image.size == (128, 128)


def test_train_inspect_generate_as_written(models: Path, run_command: Callable[..., None]) -> None:
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    block = "".join(b for b in blocks if b.startswith("ipadapter "))
    (models / "images").mkdir()
    for name in ("cat", "dog"):
        shutil.copy(models / "cat.jpg", models / "images" / f"{name}.jpg")
        (models / "images" / f"{name}.txt").write_text("a cat", encoding="utf-8")
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert [command.split()[1] for command in commands] == ["models", "data", "train", "inspect", "generate"]
    for command in commands:
        # The README's training is of a real model.
        small = ["resolution=128", "batch_size=2", "save_every=2", "mixed_precision=no"] if " train " in command else []
        run_command(command, models, *small)
        if small:  # the name says of which base model an adapter is
            (exported,) = (models / "runs" / "cats").glob("*.safetensors")
            exported.rename(exported.with_name("ip-adapter_sd15.safetensors"))
    quick = f"{sys.executable} -m ipadapter_trainer.cli " + commands[0].removeprefix("ipadapter ")
    done = subprocess.run(quick, shell=True, cwd=models, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (models / "moon.png").is_file()


def test_the_quality_table_is_the_measured_one() -> None:
    quality = json.loads((FOLDER / "quality.json").read_text(encoding="utf-8"))
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in _table("How well, how fast")}
    alone, named, mixed = (quality[asked] for asked in ("image_alone", "image_and_its_name", "image_and_text"))
    columns = ("adapter", "weight_0", "shuffled_references")
    expected = {
        "colours are closer to their prompt than to another one": [alone[c]["closer_by_histogram"] for c in columns],
        "CLIP embedding is closer to its prompt than to another one": [alone[c]["closer_by_clip"] for c in columns],
        "shows the object of its prompt": [alone[c]["concept"] for c in columns],
        "has the drawing style of its prompt": [alone[c]["style"] for c in columns],
        "beside its name: shows the object of its prompt": [named[c]["concept"] for c in columns],
        "beside another text: shows the object of the text": [mixed[c]["concept_of_the_text"] for c in columns],
        "beside another text: has the drawing style of its prompt": [mixed[c]["style"] for c in columns],
    }
    for title, values in expected.items():
        assert table[title][:3] == [f"{value:.0%}" for value in values], title
    text = " ".join(README.split())
    unseen = quality["unseen_concept"]["adapter"]
    assert f"in {unseen['closer_by_histogram']:.0%} by colour and {unseen['closer_by_clip']:.0%} by CLIP" in text
    judges = quality["judges_on_real_held_out_images"]
    assert f"right on {judges['style']:.0%} and {judges['concept']:.0%} of real images" in text


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    """Links inside the repository: the file exists, and has the heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.is_file(), target
        assert not heading or heading in _anchors(file), target


def test_the_functions_of_the_architecture_page_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/\w+\.py):(\w+)`", page)
    assert len(named) > 8
    for file, name in named:
        text = (ROOT / "ipadapter_trainer" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:def|class) {name}\b", text, re.MULTILINE), (file, name)


def test_the_rooms_of_the_architecture_page_exist() -> None:
    folder = ROOT / "ipadapter_trainer"
    packages = {file.parent.name for file in folder.glob("*/__init__.py")}
    assert _rows_of_rooms().keys() == packages | {file.stem for file in folder.glob("[!_]*.py")}


def test_rooms_import_only_their_own_row_and_lower_ones() -> None:
    rows = _rows_of_rooms()
    folder = ROOT / "ipadapter_trainer"
    imports = {
        (room, _room(file), str(file.relative_to(folder)))
        for file in folder.rglob("*.py")
        for room in _imported_rooms(file)
        if _room(file) in rows
    }
    assert {(room, importer) for room, importer, _ in imports} >= {("data", "training"), ("settings", "training")}
    upwards = {file: room for room, importer, file in imports if rows[room] < rows[importer]}
    assert not upwards


def _rows_of_rooms() -> dict[str, int]:
    """The rooms of the architecture page, with the numbers of their rows from the top."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("| room | contents |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    return {room: number for number, row in enumerate(rows) for room in re.findall(r"`(\w+)`", row)}


def _room(file: Path) -> str:
    return file.relative_to(ROOT / "ipadapter_trainer").parts[0].removesuffix(".py")


def _imported_rooms(file: Path) -> set[str]:
    """The other rooms that a module imports, at its top or in a function."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module or "").split(".")) if node.module else above
            names |= {(*module, alias.name) for alias in node.names}
    rooms = {name[1] for name in names if name[0] == "ipadapter_trainer" and len(name) > 1}
    return (rooms & _rows_of_rooms().keys()) - {_room(file)}


def _anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _table(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]
