"""`ipadapter new`: a config to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ipadapter_trainer.cli import app
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import config_of_arguments
from ipadapter_trainer.settings.shipped import config_folder, config_names, find_config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["new", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_without_a_name_the_configs_are_listed() -> None:
    code, out, _ = new()
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(lines) == config_names() and len(lines) == 23
    assert lines["sd15-plus"] == "IP-Adapter Plus for SD1.5: 16 tokens from the image's patches through a resampler"
    assert all(lines.values())


def test_a_copy_is_the_config_with_its_own_name() -> None:
    code, out, _ = new("sd15-plus", "my/plus.toml")
    assert (code, out) == (
        0,
        "Saved my/plus.toml. Train with: ipadapter train my/plus.toml data=images output=runs/mine\n",
    )
    text = Path("my/plus.toml").read_text()
    assert "#     ipadapter train my/plus.toml data=images output=runs/mine\n" in text
    original = (config_folder() / "sd15-plus.toml").read_text()
    assert text == original.replace("ipadapter train sd15-plus ", "ipadapter train my/plus.toml ")
    assert config_of_arguments(TrainConfig, "train", ["my/plus.toml"]) == config_of_arguments(
        TrainConfig, "train", ["sd15-plus"]
    )


@pytest.mark.parametrize("name", config_names())
def test_every_config_can_be_copied(name: str) -> None:
    assert new(name)[0] == 0
    assert f"ipadapter train {name}.toml" in Path(f"{name}.toml").read_text()


def test_nothing_is_overwritten() -> None:
    Path("mine.toml").write_text("mine")
    assert new("sd15-plus", "mine.toml") == (
        2,
        "",
        "ipadapter: mine.toml exists already. Choose another name, or delete it.\n",
    )
    assert Path("mine.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sd15-pls"], "sd15-pls: no such config. Did you mean sd15-plus?"),
        (["xyz"], "xyz: no such config. `ipadapter new` lists the configs that come with this package."),
        (["sd15-plus", "mine"], "mine: a config ends in .toml. Write `ipadapter new sd15-plus mine.toml`."),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], message: str) -> None:
    assert new(*arguments) == (2, "", f"ipadapter: {message}\n")


@pytest.mark.parametrize("word", ["sd15-base", "sd15-base.toml", "configs/sd15-base.toml", "configs/sd15-base"])
def test_a_config_is_found_by_name(word: str) -> None:
    assert find_config(word) == config_folder() / "sd15-base.toml"


def test_a_path_that_exists_wins() -> None:
    Path("sd15-base").write_text("")
    Path("configs").mkdir()
    Path("configs/sdxl-base.toml").write_text("")
    assert find_config("sd15-base") == Path("sd15-base")
    assert find_config("configs/sdxl-base.toml") == Path("configs/sdxl-base.toml")
    Path("sd2-base").mkdir()  # an output folder of that name is no config
    assert find_config("sd2-base") == config_folder() / "sd2-base.toml"
