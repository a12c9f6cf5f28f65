"""What pip installs: the configs come with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .warm_python import WarmPython

ROOT = Path(__file__).parents[2]
PARTS = ("ipadapter_trainer", "ipadapter_core", "assets", "configs")
Run = Callable[..., tuple[int | None, str, str]]
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, unpacked as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


CODE = "import ipadapter_trainer as t; print(t.__file__); from ipadapter_trainer.cli import main; main()"


def ipadapter(installed: Path, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The installed command in a folder that is no checkout."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, output(installed, done.stdout), done.stderr


def output(installed: Path, stdout: str) -> str:
    """What the command wrote, which is the installed one."""
    where, _, out = stdout.partition("\n")
    assert Path(where).is_relative_to(installed)
    return out


@pytest.fixture
def warm_ipadapter(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The same, in forks of a process that imported the installed packages once."""
    python = WarmPython(tmp_path_factory.mktemp("installed"), {"PYTHONPATH": str(installed)})

    def run(folder: Path, *arguments: str) -> tuple[int | None, str, str]:
        process = python.start(CODE, arguments, folder)
        out, err = process.communicate()
        return process.returncode, output(installed, out), err

    yield run
    python.close()


def test_an_installed_wheel_has_every_config(installed: Path, tmp_path: Path) -> None:
    names = {file.stem for file in (ROOT / "configs").glob("*.toml")}
    code, out, _ = ipadapter(installed, tmp_path, "new")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == names


def test_an_installed_wheel_trains_by_name(warm_ipadapter: Run, images: Path, tmp_path: Path) -> None:
    """The emoji config, whose model comes with the package; a new config of it; and a file that wins over the name."""
    small = (f"data={images}", "steps=1", "batch_size=2", "num_workers=0", "log_with=none", "sample_images=0")
    code, _, err = warm_ipadapter(tmp_path, "train", "emoji-base", *small)
    assert code == 0, err
    assert (tmp_path / "runs" / "emoji").is_dir()
    assert warm_ipadapter(tmp_path, "new", "emoji-base", "mine.toml")[0] == 0
    code, _, err = warm_ipadapter(tmp_path, "train", "mine.toml", "--dry-run", *small)
    assert code == 0, err
    (tmp_path / "emoji-base").write_text("nonsense = 1\n")
    _, _, err = warm_ipadapter(tmp_path, "train", "emoji-base", *small)
    assert "unknown key 'nonsense'" in err
    (tmp_path / "emoji-base").unlink()
    _, _, err = warm_ipadapter(tmp_path, "train", "configs/emoji-base.toml", *small, "steps_=1")
    assert "unknown key 'steps_'" in err
