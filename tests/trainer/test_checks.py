"""Everything that is refused or warned of before a weight of the frozen models is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from ipadapter_core import AdapterError, IPAdapter, export_state
from ipadapter_trainer.errors import CacheError, CheckpointError, ConfigError, DataError
from ipadapter_trainer.files.opening import ADAPTER_FILE, STATE_FILE
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.checks import FEW_IMAGES, MANY_EPOCHS, check_training, plan_warnings
from ipadapter_trainer.training.dry_run import dry_run
from ipadapter_trainer.training.train import train

from .tiny_data import sample, write_shard


def shard(folder: Path) -> Path:
    return write_shard(folder / "a.tar", {f"{number:04}": sample(number) for number in range(6)})


# ---- what is refused


def no_file(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"init_from": folder / "nothing.safetensors"}


def a_damaged_checkpoint(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    checkpoint = Path(settings["output"]) / "checkpoint-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / ADAPTER_FILE).touch()
    (checkpoint / STATE_FILE).write_bytes(b"PK\x03\x04 half of it")
    return {}


def no_readable_image(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    for file in Path(settings["data"]).glob("*.png"):
        file.write_bytes(b"no image")
    return {}


def no_cache(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"cache": folder / "nothing"}


def too_few_shards(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"data": str(shard(folder)), "num_workers": 2}


def no_shard(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"data": str(folder / "{0..3}.tar")}


Wrong = Callable[[dict[str, Any], Path], dict[str, Any]]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (no_file, AdapterError, "nothing.safetensors"),
        (a_damaged_checkpoint, CheckpointError, "damaged.*Delete"),
        (no_readable_image, DataError, "None of the 6 images can be read"),
        (no_cache, CacheError, "holds no cache. Run `ipadapter cache`"),
        (too_few_shards, DataError, "Set num_workers=1"),
        (no_shard, DataError, "0.tar"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_train_is_refused_before_weights_are_read(
    wrong: Wrong, error: type[Exception], words: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= wrong(settings, tmp_path)
    with pytest.raises(error, match=words):
        check_training(make_config(settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log_with": "wandb"}, "log_with=wandb needs wandb. Install it with `pip install wandb`"),
        ({"optimizer": "prodigy", "learning_rate": 1}, "optimizer=prodigy needs prodigyopt. Install it with"),
        ({"steps": None, "epochs": 1, "lr_warmup_steps": 3}, "lr_warmup_steps=3 leave nothing of the 3 steps"),
    ],
    ids=["log_with", "optimizer", "lr_warmup_steps"],
)
def test_the_dry_run_and_the_training_refuse_alike(
    changes: dict[str, Any], words: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as if it were not installed
    if "wandb" in sys.modules:
        pytest.skip("wandb is installed")
    config = make_config({**settings, **changes})
    for door in (lambda: train(config), lambda: dry_run(config, lambda line: None)):
        with pytest.raises(ConfigError, match=words):
            door()
    assert not Path(settings["output"]).exists()


def test_the_adapter_to_start_from_is_read_and_has_to_fit(
    settings: dict[str, Any], random_adapter: Callable[..., IPAdapter], tmp_path: Path
) -> None:
    file = tmp_path / "published.safetensors"
    save_file(export_state(random_adapter("base")), str(file))
    with pytest.raises(AdapterError, match="published"):  # for a context of 64, not of 32
        check_training(make_config({**settings, "init_from": file}))


def test_a_check_reads_no_weight(settings: dict[str, Any]) -> None:
    checked = check_training(make_config(settings))
    assert checked.base_model._loaded == {}
    assert (checked.steps, checked.checkpoint, checked.start_step) == (6, None, 0)


# ---- what is warned of


def test_images_are_tried_as_a_step_would_make_them(settings: dict[str, Any]) -> None:
    (Path(settings["data"]) / "red.png").write_bytes(b"no image")
    warnings = check_training(make_config({**settings, "validation_images": 0})).warnings
    assert any("cannot be read: " in line and "red.png" in line for line in warnings)


def test_self_reference_is_for_rows_with_a_reference(settings: dict[str, Any]) -> None:
    words = "self_reference=0.2 has no effect: no row has a reference, so each image already is its own prompt"
    assert words in check_training(make_config({**settings, "self_reference": 0.2})).warnings
    row = '{"file_name": "red.png", "text": "a", "reference": "blue.png"}'
    (Path(settings["data"]) / "metadata.jsonl").write_text(row)
    assert words not in check_training(make_config({**settings, "self_reference": 0.2})).warnings


def test_a_stream_of_shards_is_tried(settings: dict[str, Any], tmp_path: Path) -> None:
    checked = check_training(make_config({**settings, "data": str(shard(tmp_path))}))
    assert checked.data.try_images() == (4, [])
    assert checked.warnings == ["save_every=1,000 is more than the 6 steps: a crash costs all of them."]


def expected(size: int | None, steps: int, per_step: int, **changes: Any) -> list[str]:
    given = {"base_model": "a", "data": "b", "output": "c", "steps": steps, "save_every": 1, "validate_every": 1}
    config = TrainConfig(**{**given, **changes})  # type: ignore[arg-type]
    return plan_warnings(config, size, 10, steps, per_step)


def test_a_plan_without_hope_names_the_number_and_the_fine_tune_config() -> None:
    """101 images under the paper's recipe, as it was reported."""
    few, often = expected(101, 200_000, 64)
    assert few.startswith("101 images do not train an adapter from scratch; that takes 1,000 at the very least.")
    assert often.startswith("200,000 steps of 64 show each of the 101 images 126,733 times; beyond 500 times")
    assert all("sd15-plus-finetune" in line for line in (few, often))
    assert (Path(__file__).parents[2] / "configs" / "sd15-plus-finetune.toml").is_file()


def test_reasonable_plans_are_not_warned_of() -> None:
    assert expected(101, 2000, 8, init_from="a.safetensors") == []  # the fine-tune config
    assert expected(10_000_000, 1_000_000, 64) == []  # the paper
    assert expected(1140 - 16, 300, 16) == []  # configs/emoji-base.toml
    assert expected(None, 1_000_000, 64) == []  # a stream


@pytest.mark.parametrize(
    ("size", "steps", "per_step", "changes", "words"),
    [
        (FEW_IMAGES - 1, 10, 8, {}, "999 images do not train an adapter from scratch"),
        (FEW_IMAGES, MANY_EPOCHS * FEW_IMAGES // 8 + 1, 8, {}, "show each of the 1,000 images 500 times"),
        (20, 10, 64, {"init_from": "a"}, "A step takes 64 images, but there are only 20"),
        (5000, 10, 8, {"save_every": 11}, "save_every=11 is more than the 10 steps: a crash costs all of them"),
        (5000, 10, 8, {"validate_every": 11}, "the validation runs at the start and at the end only"),
    ],
)
def test_each_warning_has_its_border(size: int, steps: int, per_step: int, changes: dict[str, Any], words: str) -> None:
    (line,) = expected(size, steps, per_step, **changes)
    assert words in line
