"""Text and paths that are not UTF-8: half of an emoji in JSON, bytes of another encoding, byte order marks, DEL."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ipadapter_core import AdapterError, load_adapter
from ipadapter_trainer.data.examples import find_examples, fingerprint
from ipadapter_trainer.data.tar_samples import index_shards
from ipadapter_trainer.errors import ConfigError, DataError
from ipadapter_trainer.evaluation.prompts import read_examples
from ipadapter_trainer.evaluation.scores import Score, append_scores, read_scores, score_file
from ipadapter_trainer.report.run_files import replace_text, to_toml
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import load_config, make_config, validate
from ipadapter_trainer.settings.eval_config import EvalConfig
from ipadapter_trainer.settings.fields import Config
from ipadapter_trainer.settings.generate_config import GenerateConfig
from ipadapter_trainer.settings.shipped import write_config

from .tiny_data import sample, write_shard

HALF = "cut \ud83d"  # of an emoji
LATIN = os.fsdecode(b"caf\xe9")
MINIMAL = {"base_model": "m", "data": "d", "output": "o", "steps": 10}
GENERATE = {"base_model": "b", "output": "o.png"}
EVAL = {"base_model": "b", "adapter": "a", "data": "d", "clip": "c"}

needs_names_of_bytes = pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")


@pytest.mark.parametrize("command", ["data check", "train"])
def test_half_an_emoji_in_a_list_is_named_with_its_line(
    command: str, settings: dict[str, Any], run_ipadapter: Callable[..., Any]
) -> None:
    images = Path(settings["data"])
    rows = [{"file_name": "red.png", "text": "whole \U0001f600"}, {"file_name": "blue.png", "text": HALF}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [images, "--no-sheet"] if command == "data check" else [f"{k}={v}" for k, v in settings.items()]
    process = run_ipadapter(*command.split(), *arguments)
    out, err = process.communicate(timeout=120)
    expected = f"{images / 'metadata.jsonl'} line 2: 'text' is not UTF-8 text: '\\ud83d' at position 4"
    assert process.returncode == 2
    assert expected in out + err and "Traceback" not in err


@pytest.mark.parametrize("key", ["file_name", "reference"])
def test_a_name_in_a_list_may_have_bytes_but_no_halves(images: Path, key: str) -> None:
    row = {"file_name": "red.png", "text": "red", "reference": ["blue.png"]}
    (images / "metadata.jsonl").write_text(json.dumps({**row, key: f"{HALF}.png"}))
    with pytest.raises(DataError, match=rf"line 1: '{key}' is not UTF-8 text"):
        find_examples(images)


@needs_names_of_bytes
def test_names_of_files_may_have_any_bytes(images: Path, tmp_path: Path) -> None:
    name = f"{LATIN}.png"
    (images / "red.png").rename(images / name)
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "red"}))
    (example,) = find_examples(images)
    assert fingerprint([example], images)
    score = Score(0, 0, 1.0, 5, str(example.image), 0.5, None, None, None)
    append_scores(score_file(tmp_path), "settings", [score])
    assert read_scores(tmp_path, "settings") == ({score.job: score}, 0)


def test_half_an_emoji_in_a_shard_is_named_with_its_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = sample(0), sample(1)
    del cut["txt"]
    cut["json"] = json.dumps({"caption": HALF}).encode()
    shard = write_shard(tmp_path / "s.tar", {"0": whole, "1": cut})
    assert len(index_shards([str(shard)])) == 1
    assert "s.tar/1: 'caption' is not UTF-8 text: '\\ud83d' at position 4" in caplog.text


def test_half_an_emoji_in_cocos_captions_is_named(images: Path, tmp_path: Path) -> None:
    annotations = {"annotations": [{"image_id": 7, "caption": HALF}], "images": [{"id": 7, "file_name": "red.png"}]}
    (tmp_path / "captions.json").write_text(json.dumps(annotations))
    with pytest.raises(DataError, match=r"captions\.json: a caption of image 7 is not UTF-8 text"):
        read_examples(tmp_path / "captions.json", images)


@pytest.mark.parametrize("text", [HALF, LATIN])
@pytest.mark.parametrize(
    ("model", "values", "key"),
    [
        (TrainConfig, MINIMAL, "sample_prompt"),
        (GenerateConfig, GENERATE, "prompt"),
        (GenerateConfig, GENERATE, "negative_prompt"),
        (EvalConfig, EVAL, "caption_prefix"),
    ],
)
def test_texts_are_utf8(model: type[Config], values: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = {re.escape(repr(text))}: expected a text in UTF-8"):
        validate(model, {**values, key: text})


@pytest.mark.parametrize("key", ["base_model", "output", "init_from", "cache", "data"])
def test_paths_are_utf8(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = 'caf\\udce9': expected a path in UTF-8; rename it"):
        make_config({**MINIMAL, key: LATIN})
    with pytest.raises(ConfigError, match=r"data = 'a.x00b': expected a path, which holds no zero bytes"):
        make_config({**MINIMAL, "data": "a\0b"})


@needs_names_of_bytes
def test_a_training_on_files_of_any_name(settings: dict[str, Any], run_ipadapter: Callable[..., Any]) -> None:
    data, output = Path(settings["data"]), Path(settings["output"])
    (data / "red.png").rename(data / f"{LATIN}.png")
    (data / "red.txt").rename(data / f"{LATIN}.txt")
    values = {**settings, "data": data, "steps": 1, "log_with": "tensorboard"}
    for arguments in ([f"{key}={value}" for key, value in values.items()], [output / "config.toml", "steps=2"]):
        process = run_ipadapter("train", *arguments)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert (output / "report.html").is_file()


@needs_names_of_bytes
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_of_tensors_of_another_name_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"{LATIN}{suffix}"
    tensors = {"a": torch.zeros(2)}
    file.write_bytes(safetensors.torch.save(tensors)) if suffix == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(AdapterError, match=r"caf.udce9\.\w+' is not UTF-8, and .* Rename it"):
        load_adapter(file)


def test_settings_are_read_as_they_are_written(tmp_path: Path) -> None:
    given = {**MINIMAL, "sample_prompt": 'DEL \x7f, tab \t, "quoted" \\ \U0001f600 \u2028'}
    config = make_config(given)
    replace_text(tmp_path / "c.toml", to_toml(config.model_dump(mode="json")))
    assert load_config(TrainConfig, tmp_path / "c.toml") == config


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in MINIMAL.items())
    (tmp_path / "c.toml").write_text(text, encoding="utf-8-sig")
    assert load_config(TrainConfig, tmp_path / "c.toml") == make_config(MINIMAL)
    copy = write_config(str(tmp_path / "c.toml"), tmp_path / "copy.toml")
    assert copy.read_text(encoding="utf-8") == text
    (tmp_path / "c.toml").write_text(text, encoding="utf-16")
    with pytest.raises(ConfigError, match=r"c\.toml: not valid TOML \('utf-8' codec can't decode byte 0xff"):
        load_config(TrainConfig, tmp_path / "c.toml")
