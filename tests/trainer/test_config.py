from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipadapter_trainer.errors import ConfigError
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import config_of_arguments, load_config, make_config, options_text, validate
from ipadapter_trainer.settings.eval_config import EvalConfig
from ipadapter_trainer.settings.fields import Config, parse_size
from ipadapter_trainer.settings.generate_config import GenerateConfig

MINIMAL: dict[str, Any] = {"base_model": "m", "data": "d", "output": "o", "steps": 10}


def test_the_defaults_are_the_papers_recipe() -> None:
    config = make_config(MINIMAL)
    assert (config.learning_rate, config.weight_decay, config.num_tokens) == (1e-4, 0.01, None)
    assert (config.text_dropout, config.image_dropout, config.both_dropout) == (0.05, 0.05, 0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rat": 1}, ["unknown key 'learning_rat'", "'learning_rate'"]),
        ({"zzz": 1}, ["unknown key 'zzz'", "--options"]),
        ({"learning_rate": "fast"}, ["learning_rate = 'fast'", "a number"]),
        ({"batch_size": "2.5"}, ["batch_size = '2.5'", "a whole number"]),
        ({"batch_size": 0}, ["batch_size = 0", "at least 1"]),
        ({"learning_rate": 0}, ["learning_rate = 0", "more than 0"]),
        ({"learning_rate": "nan"}, ["learning_rate = 'nan'", "a finite number"]),
        ({"noise_offset": float("inf")}, ["noise_offset = inf", "a finite number"]),
        ({"epochs": "inf", "steps": None}, ["epochs = 'inf'", "a finite number"]),
        ({"ema_decay": 1}, ["ema_decay = 1", "less than 1"]),
        ({"flip": "perhaps"}, ["flip = 'perhaps'", "true or false"]),
        ({"resolution": 500}, ["resolution = 500", "a multiple of 8"]),
        ({"seed": 2**32}, ["seed = 4294967296", "at most 4294967295"]),
        ({"resolution": 1_000_000}, ["resolution = 1000000", "at most 16384"]),
        ({"sample_steps": 1001}, ["sample_steps = 1001", "at most 1000"]),
        ({"mixed_precision": "int4"}, ["mixed_precision = 'int4'", "'no'", "'bf16'", "'fp16'"]),
        ({"kind": "faceid2"}, ["kind = 'faceid2'", "'faceid-plusv2'"]),
        ({"steps": None}, ["either steps or epochs"]),
        ({"epochs": 2}, ["either steps or epochs"]),
        ({"text_dropout": 0.9, "image_dropout": 0.2}, ["1.15", "at most 1"]),
        (
            {"image_dropout": 1, "both_dropout": 0, "text_dropout": 0},
            ["image_dropout + both_dropout is 1", "less than 1"],
        ),
        ({"image_dropout": 0.5, "both_dropout": 0.5, "text_dropout": 0}, ["would never see an image"]),
        ({"data_root": "x"}, ["data_root", "'d'"]),
        ({"data": "list.txt", "data_root": "x"}, ["data_root", "'list.txt'"]),
        ({"data": 3}, ["data = 3", "text"]),
        ({"data": ""}, ["data is missing"]),
        ({"output": ""}, ["output is missing"]),
        ({"output": 3}, ["output = 3", "a path"]),
        ({"data": "s-{0..9}.tar", "steps": None, "epochs": 1}, ["epochs=1.0", "give steps"]),
        ({"data": "s-{0..9}.tar", "buckets": True}, ["buckets", "cache the shards"]),
        ({"face_embeds": "f.safetensors"}, ["face_embeds", "'base'"]),
        ({"kind": "full", "num_tokens": 4}, ["num_tokens=4", "token per patch"]),
        ({"optimizer": "prodigy"}, ["learning_rate=1", "0.0001"]),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, ["schedulefree", "'cosine'"]),
        ({"optimizer": "schedulefree", "ema_decay": 0.9}, ["ema_decay=0", "0.9"]),
        ({"lr_scheduler": "cosine_with_restarts"}, ["'cosine_with_restarts' is cosine", "set cosine"]),
        ({"lr_scheduler": "polynomial"}, ["'polynomial' is linear", "set linear"]),
        ({"lr_scheduler": "step"}, ["lr_scheduler = 'step': expected 'constant', 'cosine' or 'linear'"]),
        ({"lr_warmup_steps": 10}, ["lr_warmup_steps=10", "steps=10"]),
        ({"buckets": True, "resolution": 32}, ["bucket_step=64", "resolution=32"]),
        ({"bucket_step": 32}, ["bucket_step=32 has no effect", "buckets=true"]),
        ({"zero_terminal_snr": True, "prediction_type": "epsilon"}, ["v_prediction"]),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_config({**MINIMAL, **changes})
    for word in words:
        assert word in str(error.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"base_model is missing.*data is missing.*stepz"):
        make_config({"output": "o", "stepz": 1})


def test_overrides_win_over_the_file_and_can_unset(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('base_model = "m"\ndata = "~/d"\noutput = "o"\nsteps = 5\n')
    config = load_config(TrainConfig, file, ["steps=none", "epochs=1.5", "flip=true", "learning_rate=2e-5"])
    assert (config.steps, config.epochs, config.flip, config.learning_rate) == (None, 1.5, True, 2e-5)
    assert config.data == str(Path("~/d").expanduser())


@pytest.mark.parametrize("key", ["output", "data", "data_root", "cache", "resume", "face_embeds"])
def test_a_path_may_begin_with_the_home_folder(key: str) -> None:
    values = {**MINIMAL, "kind": "faceid", "data": "d.jsonl"}
    assert str(getattr(make_config({**values, key: "~/d.csv"}), key)) == str(Path.home() / "d.csv")
    with pytest.raises(ConfigError, match=rf"{key} = '~nobody\.here/d\.csv': no such user as 'nobody\.here'"):
        make_config({**values, key: "~nobody.here/d.csv"})


def test_a_text_that_begins_with_a_tilde_stays() -> None:
    """Such as the tags ~masterpiece~."""
    text = "~masterpiece~, a cat"
    assert make_config({**MINIMAL, "sample_prompt": text}).sample_prompt == text
    config = validate(GenerateConfig, {**GENERATE, "prompt": text, "negative_prompt": "~"})
    assert (config.prompt, config.negative_prompt) == (text, "~")
    assert validate(EvalConfig, {**EVAL, "caption_prefix": "~/a "}).caption_prefix == "~/a "


def test_spaces_inside_a_word_do_not_matter() -> None:
    config = config_of_arguments(TrainConfig, "train", ["base_model=m", "data=d", "output=o", "steps = 10"])
    assert config == make_config(MINIMAL)


@pytest.mark.parametrize("text", ["yes", "True", "on", "1", "no", "False", "off", "0"])
def test_a_switch_takes_the_usual_words(text: str) -> None:
    assert load_config(TrainConfig, None, [f"{k}={v}" for k, v in {**MINIMAL, "flip": text}.items()]).flip is (
        text in ("yes", "True", "on", "1")
    )


def test_every_number_has_to_be_finite() -> None:
    numbers = [name for name, field in TrainConfig.model_fields.items() if field.annotation in (float, float | None)]
    assert "reference_crop" in numbers
    for name in numbers:
        for value in (float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"{name} = {value}: expected a finite number"):
                make_config({**MINIMAL, name: value})


@pytest.mark.parametrize("override", ["steps", "=3"])
def test_an_override_needs_key_and_value(override: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(TrainConfig, None, [override])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such config file"):
        load_config(TrainConfig, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load_config(TrainConfig, tmp_path / "bad.toml")


@pytest.mark.parametrize("model", [TrainConfig, EvalConfig, GenerateConfig])
def test_every_key_is_described(model: type[Config]) -> None:
    text = options_text(model)
    for name, field in model.model_fields.items():
        assert field.description
        assert f"{name} (" in text


EVAL = {"base_model": "b", "adapter": "a", "data": "d", "clip": "c"}
GENERATE = {"base_model": "b", "output": "o.png"}


def test_the_defaults_of_an_evaluation_are_the_papers() -> None:
    config = validate(EvalConfig, EVAL)
    assert (config.limit, config.num_images_per_prompt, config.weights, config.text) == (5000, 4, (1.0,), "none")
    assert (config.num_inference_steps, config.guidance_scale) == (50, 7.5)


@pytest.mark.parametrize(
    ("given", "weights"),
    [("0,0.5,1", (0.0, 0.5, 1.0)), ("1,0", (0.0, 1.0)), ("1,1", (1.0,)), (1, (1.0,)), ([0.5, 0], (0.0, 0.5))],
)
def test_weights_are_numbers_with_commas(given: object, weights: tuple[float, ...]) -> None:
    assert validate(EvalConfig, {**EVAL, "weights": given}).weights == weights


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (EvalConfig, {"weights": "0;1"}, "weights = '0;1': expected numbers with commas, such as 0,0.5,1."),
        (EvalConfig, {"weights": ()}, "weights = ()"),
        (EvalConfig, {"weights": "one"}, "weights = 'one': expected numbers with commas, such as 0,0.5,1."),
        (EvalConfig, {"weights": "1,nan"}, "weights = nan: expected a finite number."),
        (EvalConfig, {"weights": "0,11"}, "weights = 11.0: expected at most 10."),
        (EvalConfig, {"text": "some"}, "text = 'some': expected 'none' or 'caption'."),
        (EvalConfig, {"num_inference_steps": 0}, "num_inference_steps = 0: expected at least 1."),
        (EvalConfig, {"steps": 5}, "unknown key 'steps'; did you mean 'num_inference_steps'?"),
        (EvalConfig, {"zzz": 5}, "unknown key 'zzz'; see `ipadapter eval --options`."),
        (EvalConfig, {"clip": ""}, "clip is missing; write clip=... ("),
        (GenerateConfig, {"guidance": 5}, "unknown key 'guidance'; did you mean 'guidance_scale'?"),
        (GenerateConfig, {"weight": "nan"}, "weight = 'nan': expected a finite number."),
        (GenerateConfig, {"guidance_scale": -3}, "guidance_scale = -3: expected at least 0."),
        (GenerateConfig, {"prediction_type": "v"}, "prediction_type = 'v': expected 'epsilon' or 'v_prediction'."),
        (GenerateConfig, {"image": "i.png"}, "an image prompt needs an adapter: image is set, adapter is missing."),
        (
            GenerateConfig,
            {"negative_prompt": "blurry", "guidance_scale": 1},
            "negative_prompt has no effect without guidance, but guidance_scale is 1; raise it above 1, or leave",
        ),
        (GenerateConfig, {"face_embeds": "f.npy"}, "needs an adapter: face_embeds is set, adapter is missing."),
    ],
)
def test_settings_of_the_other_commands_that_make_no_sense(
    model: type[Config], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validate(model, {**(EVAL if model is EvalConfig else GENERATE), **changes})
    assert message in str(error.value)


def test_sizes_are_read_as_people_write_them(tmp_path: Path) -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("832x1216") == (1216, 832)
    for text in ("", "x", "512x", "5.5", "1x2x3"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(text)
    file = tmp_path / "g.toml"
    file.write_text('base_model = "b"\noutput = "o.png"\nsize = 512\n')
    assert load_config(GenerateConfig, file).size == "512"
    assert load_config(GenerateConfig, file, ["size="]).size is None
    with pytest.raises(ConfigError, match="size = '64by64': expected a side or WIDTHxHEIGHT"):
        load_config(GenerateConfig, file, ["size=64by64"])
