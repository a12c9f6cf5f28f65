"""The command as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_core import AdapterError, load_adapter, save_adapter
from ipadapter_trainer.cli import app
from ipadapter_trainer.files.opening import checkpoint_folders
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.training.new_adapter import new_adapter

from .warm_python import WarmProcess, process_environment

Start = Callable[..., WarmProcess]


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def keys(settings: dict[str, Any], **changes: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


@pytest.fixture
def adapter_file(base_model: BaseModel, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "a.safetensors", new_adapter(base_model))
    return tmp_path / "a.safetensors"


def test_help_is_instant_and_lists_the_commands() -> None:
    code = "from ipadapter_trainer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "generate", "inspect", "demo"))


def test_a_name_that_the_output_cannot_show_is_escaped(images: Path) -> None:
    (images / "\u732b.png").write_bytes(b"no image")
    (images / "\u732b.txt").write_text("a cat")
    code = "from ipadapter_trainer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", str(images), "--no-sheet"],
        env={**process_environment(), "PYTHONIOENCODING": "cp1252"},  # as Windows writes into a file
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u732b.png" in done.stdout and b"Traceback" not in done.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'pydantic'}"
    code = f"import sys, ipadapter_trainer.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["train", "--options"], 0),
        (["generate", "--options"], 0),
        (["train", "sd15-base", "stepz=3"], 2),
        (["models"], 0),
    ],
)
def test_lists_and_mistakes_do_not_wait_for_torch(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from ipadapter_trainer.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: sys.exit(end.code if 'torch' not in sys.modules else 'torch was imported')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=False, capture_output=True)
    assert done.returncode == status, done.stderr.decode()


def test_version() -> None:
    code, out, _ = ipadapter("--version")
    assert (code, out.split()[0]) == (0, "ip-adapter-kit")


def test_train_with_a_file_and_overrides(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    code, out, err = ipadapter("train", file, "steps=2")
    assert code == 0, err
    assert "M parameters" in out
    assert "6 images" in out
    assert f"Saved {Path(settings['output']) / 'ip-adapter_context-32.safetensors'}" in out
    assert f"Report: {Path(settings['output']) / 'report.html'}" in out
    code, out, _ = ipadapter("train", file, "steps=3")
    assert "Resuming from" in out
    assert "2 to 3" in out


@pytest.mark.usefixtures("model_folder")
def test_a_dry_run_says_what_it_needs_and_writes_nothing(settings: dict[str, Any]) -> None:
    code, out, err = ipadapter("train", "--dry-run", *(f"{key}={value}" for key, value in settings.items()))
    assert code == 0, err
    for words in ("0.05 M trained", "6 images to train on", "GFLOPs a step", "memory", "6 of 2 images"):
        assert words in out
    assert not Path(settings["output"]).exists()
    code, _, err = ipadapter("train", "--dry-run", *(f"{k}={v}" for k, v in {**settings, "data": "nowhere"}.items()))
    assert (code, "nowhere: no such file or folder" in err) == (2, True)


def test_options_are_listed() -> None:
    code, out, _ = ipadapter("train", "--options")
    assert code == 0
    assert "learning_rate (0.0001): a number, more than 0\n" in out
    assert "optimizer (adamw): adamw, adamw8bit, prodigy or schedulefree\n" in out
    assert "prediction_type (unset): epsilon or v_prediction\n" in out
    assert "ema_decay (0.0): a number, at least 0, less than 1\n" in out
    assert "flip (false): true or false\n" in out
    assert "output (required): a path\n" in out
    assert ipadapter("cache", "--options")[1] == out


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("generate", ["output (required): a path", "num_images (1): a whole number, at least 1, at most 1000"]),
        ("eval", ["adapter (required): a path", "weights (1): numbers with commas", "text (none): none or caption"]),
    ],
)
def test_every_command_lists_its_own_options(command: str, lines: list[str]) -> None:
    code, out, _ = ipadapter(command, "--options")
    assert code == 0
    assert set(lines) <= set(out.splitlines())
    assert "learning_rate" not in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rat": "1"}, "did you mean 'learning_rate'?"),
        ({"steps": "many"}, "steps = 'many': expected a whole number"),
        ({"base_model": "/nowhere"}, "/nowhere: no such folder"),
        ({"data": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"image_encoder": "/nowhere"}, "no image encoder there"),
        ({"init_from": "/nowhere.safetensors"}, "/nowhere.safetensors: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(settings: dict[str, Any], changes: dict[str, str], words: str) -> None:
    code, _, err = ipadapter("train", *keys(settings, **changes))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            "Write `ipadapter train CONFIG key=value ...`, such as `ipadapter train sd15-base data=images "
            "output=runs/mine`. `ipadapter new` lists the configs, `ipadapter train --options` the keys.",
        ),
        ("--learning_rate 1e-4", "Write learning_rate=1e-4 instead of --learning_rate 1e-4."),
        ("--learning-rate=1e-4", "Write learning_rate=1e-4 instead of --learning-rate=1e-4."),
        ("learning-rate=1e-4 d=x", "Write learning_rate=1e-4 instead of learning-rate=1e-4."),
        ("sd15-base --flip", "Write flip=true instead of --flip."),
        ("--flip sd15-base", "Write flip=true instead of --flip."),
        ("steps = 5", "Write steps=5 instead of steps = 5."),
        ("steps =5 data= x", "Write steps=5 instead of steps =5. Write data=x instead of data= x."),
        ("sd15-base steps 5", "Write steps=5 instead of steps 5."),
        ("sd15-base 1000", "'1000' has no key. Write key=value, such as steps=1000."),
        ("steps=3 pics", "'pics' has no key. Write key=value, such as data=pics."),
        ("sd15-base --dryrun", "--dryrun: no such option or key. Did you mean --dry-run?"),
        ("sd15-base --learnin-rate 1", "--learnin-rate 1: no such option or key. Did you mean learning_rate=1?"),
        ("sd15-base --zzz", "--zzz: no such option or key. Settings are written key=value."),
        ("a.toml b.toml", "Give at most one config, not a.toml and b.toml."),
        ("sd15-base steps=3 sdxl-base", "Give at most one config, not sd15-base and sdxl-base."),
        ("sd15-bse", "sd15-bse: no such config. Did you mean sd15-base?"),
        ("configs/sdxl-plu.toml", "configs/sdxl-plu.toml: no such config. Did you mean sdxl-plus?"),
        ("steps=3 a.toml", "a.toml: no such config. `ipadapter new` lists the configs that come with this package."),
        ("/", "/ is a folder, not a config. If it holds the images, write data=/."),
        ("sd15-base steps=3 steps=4", "steps is given twice, '3' and '4'. Leave one out."),
        (
            "sd15-base stepz=3 batchsize=4",
            "unknown key 'stepz'; did you mean 'steps'?; unknown key 'batchsize'; did you mean 'batch_size'?",
        ),
        (
            "sd15-base learning_rate=nan min_snr_gamma=inf ema_decay=1",
            "learning_rate = 'nan': expected a finite number; ema_decay = '1': expected less than 1; "
            "min_snr_gamma = 'inf': expected a finite number.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "cache"])
def test_another_way_of_writing_is_answered_with_ours(command: str, arguments: str, message: str) -> None:
    if command == "cache":
        message = message.replace("train CONFIG", "cache CONFIG").replace("train sd15-base", "cache sd15-base")
        message = message.replace("output=runs", "cache=caches").replace("Did you mean --dry-run?", NO_OPTION)
    code, out, err = ipadapter(command, *arguments.split())
    assert (code, out, err) == (2, "", f"ipadapter: {message}\n")


NO_OPTION = "Settings are written key=value."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", "No such command 'trian'"),
        ("data chek", "No such command 'chek'"),
        (
            "generate",
            "Write `ipadapter generate key=value ...`, such as `ipadapter generate base_model=models/"
            "stable-diffusion-v1-5 adapter=runs/mine image=cat.png output=image.png`. `ipadapter generate --options` "
            "lists the keys.",
        ),
        ("eval", "`ipadapter eval --options` lists the keys."),
        ("generate output=o.png", "base_model is missing; write base_model=... (Base model"),
        (
            "generate --base-model x --output o.png",
            "Write base_model=x instead of --base-model x. Write output=o.png instead of --output o.png.",
        ),
        ("generate --stps 3", "--stps 3: no such option or key. Did you mean num_inference_steps=3?"),
        ("generate --steps 3", "--steps 3: no such option or key. Did you mean num_inference_steps=3?"),
        ("generate --shortcut", "Write shortcut=true instead of --shortcut."),
        ("generate --option", "--option: no such option or key. Did you mean --options?"),
        ("generate base-model=x", "Write base_model=x instead of base-model=x."),
        ("generate prompt = cat", "Write prompt=cat instead of prompt = cat."),
        (
            "generate cat.png 2",
            "'cat.png' has no key. Write key=value, such as image=cat.png. '2' has no key. Write key",
        ),
        ("generate sd15-base", "'sd15-base' has no key."),
        ("generate nowhere.toml output=o.png", "nowhere.toml: no such config."),
        ("generate image=a.png image=b.png", "image is given twice, 'a.png' and 'b.png'. Leave one out."),
        ("generate base_model=x output=o.png weight=nan", "weight = 'nan': expected a finite number."),
        ("generate base_model=x output=o.png guidance_scale=inf", "guidance_scale = 'inf': expected a finite number."),
        ("generate base_model=x output=o.png num_inference_steps=0", "num_inference_steps = '0': expected at least 1."),
        ("demo --minutes inf", "'--minutes': inf is not a finite number."),
        ("diff a b --tolerance inf", "'--tolerance': inf is not a finite number."),
        ("eval base_model=x adapter=y data=z clip=c guidance_scale=nan", "guidance_scale = 'nan': expected a finite n"),
        ("eval base_model=x adapter=y data=z clip=c weights=1,nan", "weights = nan: expected a finite number."),
        ("eval base_model=x adapter=y data=z clip=c wieghts=1", "unknown key 'wieghts'; did you mean 'weights'?"),
        (
            "eval --weights 0,1 images",
            "Write weights=0,1 instead of --weights 0,1. 'images' has no key. Write key=value",
        ),
    ],
)
def test_every_command_answers_with_one_line(arguments: str, words: str) -> None:
    code, _, err = ipadapter(*arguments.split())
    assert code == 2
    assert words in err
    assert err.startswith("ipadapter: ") and len(err.splitlines()) == 1


def test_without_arguments_there_is_help() -> None:
    for arguments in ([], ["data"]):
        code, out, err = ipadapter(*arguments)
        assert code in (0, 2)
        assert "Usage:" in out + err


def test_generate_writes_images(model_folder: Path, adapter_file: Path, images: Path, tmp_path: Path) -> None:
    common = ["generate", f"base_model={model_folder}", "num_inference_steps=2"]
    prompt = [f"adapter={adapter_file}", f"image={images / 'red.png'}", "prompt=a red square"]
    code, _, err = ipadapter(*common, *prompt, "num_images=2", f"output={tmp_path / 'new' / 'o.png'}")
    assert code == 0, err
    assert [Image.open(tmp_path / "new" / f"o-{i}.png").size for i in (1, 2)] == [(64, 64)] * 2
    code, out, _ = ipadapter(*common, f"output={tmp_path / 'plain.png'}")
    assert (code, out.strip()) == (0, f"Saved {tmp_path / 'plain.png'}")


def test_generate_with_a_file_of_settings(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(f'base_model = "{model_folder}"\nnum_inference_steps = 1\nsize = 64\nprompt = "a red square"\n')
    code, out, err = ipadapter("generate", file, f"output={tmp_path / 'o.png'}", "num_images=2")
    assert code == 0, err
    assert out.splitlines() == [f"Saved {tmp_path / f'o-{i}.png'}" for i in (1, 2)]


def test_generate_names_what_is_wrong(model_folder: Path, adapter_file: Path, images: Path, tmp_path: Path) -> None:
    settings = {"base_model": model_folder, "output": tmp_path / "o.png"}
    image = images / "red.png"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapter": adapter_file}, "image is missing"),
        ({"image": image}, "adapter is missing"),
        ({"adapter": image, "image": image}, "PNG image"),
        ({"adapter": adapter_file, "image": adapter_file}, "a safetensors file; expected JPEG, PNG"),
        ({"adapter": adapter_file, "image": "/nowhere.png"}, "/nowhere.png: no such image"),
        ({"output": tmp_path / "o.xyz"}, "unknown image suffix"),
        ({"output": tmp_path}, "this is a folder"),
        ({"size": 60}, "multiple of 8"),
    ]
    for changes, words in cases:
        code, _, err = ipadapter("generate", *keys(settings, **changes))
        assert (code, "Traceback" in err) == (2, False)
        assert words in err


def test_inspect(adapter_file: Path, images: Path) -> None:
    code, out, _ = ipadapter("inspect", adapter_file)
    assert code == 0
    for words in ("base", "16 cross-attention layers", "tokens", "float32", "ipadapter.kind"):
        assert words in out
    code, out, _ = ipadapter("inspect", adapter_file, "--json")
    described = json.loads(out)
    assert (described["kind"], described["num_tokens"], described["layers"]) == ("base", 4, 16)
    assert described["parameters"] == sum(4 * 32 * n for n in (24, 1)) + 2 * 32 + 2 * 32 * sum(described["layer_dims"])
    for wrong in (images / "red.png", Path("/nowhere.safetensors")):
        code, _, err = ipadapter("inspect", wrong)
        assert code == 2
        assert str(wrong) in err
    weights = load_file(adapter_file)
    weights["ip_adapter.1.to_v_ip.weight"][-1, -1] = float("nan")
    save_file(weights, adapter_file)
    code, out, err = ipadapter("inspect", adapter_file)
    assert (code, out) == (2, "")
    assert f"{adapter_file}: the tensor 1.to_v_ip.weight holds NaN or infinity." in err


def test_inspect_and_the_loader_agree_on_other_adapters(adapter_file: Path, tmp_path: Path) -> None:
    """One table names them, for the nodes too."""
    file = tmp_path / "instruct.safetensors"
    save_file({**load_file(adapter_file), "image_proj.proj_new_input.weight": torch.ones(2, 2)}, file)
    code, _, err = ipadapter("inspect", file)
    with pytest.raises(AdapterError) as error:
        load_adapter(file)
    assert code == 2 and "an IPAdapter-Instruct adapter, not an IP-Adapter" in err
    assert str(error.value) in " ".join(err.split())


def test_an_option_given_twice_is_refused() -> None:
    code, _, err = ipadapter("export", "runs/cats", "adapters/", "--dtype=float16", "--dtype", "float32")
    assert code == 2
    assert "--dtype is given 2 times. Give it once." in err


def test_sigterm_while_models_load_leaves_no_lock(settings: dict[str, Any], run_ipadapter: Start) -> None:
    process = run_ipadapter("train", *keys(settings, steps=100000))
    output = Path(settings["output"])
    while not any(output.glob(".in-use*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not any(output.glob(".in-use*"))


def test_ctrl_c_saves_and_says_how_to_go_on(settings: dict[str, Any], run_ipadapter: Start) -> None:
    process = run_ipadapter("train", *keys(settings, steps=100000, num_workers=1))
    log = Path(settings["output"]) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    (folder,) = checkpoint_folders(Path(settings["output"]))
    assert f"Stopped; saved {folder}. Run the same command again to resume." in err
    done = int(folder.name.removeprefix("checkpoint-"))
    code, out, _ = ipadapter("train", *keys(settings, steps=done + 1, num_workers=0))
    assert code == 0
    assert f"Resuming from {folder}" in out
    assert f"{done:,} to {done + 1:,}" in out


def test_the_training_survives_a_run_without_main_thread(settings: dict[str, Any]) -> None:
    """Signals belong to the main thread; a program that trains in another one must still work."""
    from threading import Thread

    from ipadapter_trainer.settings.config_file import make_config
    from ipadapter_trainer.training.train import train

    files: list[Path] = []
    thread = Thread(target=lambda: files.append(train(make_config({**settings, "steps": 1}))))
    thread.start()
    thread.join()
    assert files[0].is_file()
