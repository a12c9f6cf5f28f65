"""Ctrl-C in a terminal, once and twice, at any moment: one line, no traceback, no half file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipadapter_trainer.files.opening import checkpoint_folders

from .test_cli import keys
from .test_finish import more_images
from .warm_python import WarmProcess, WarmPython

# A process in the background ignores Ctrl-C, and so would its children: the test may run there.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{moment}
from ipadapter_trainer.cli import main
main()
"""
# Prints when `name` of `module` is called, which then takes a while.
AT = """
import {module} as module, time
original = module.{name}
def slow(*arguments, **options):
    print("MOMENT", file=sys.stderr, flush=True)
    result = original(*arguments, **options)
    time.sleep({seconds})
    return result
module.{name} = slow
"""


class Command:
    """A command in a process group of its own, as a shell starts it."""

    def __init__(self, process: WarmProcess) -> None:
        self.process = process
        self.moments = 0

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not ready():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_moment(self) -> None:
        """The first moment, or the next one after it."""
        self.moments += 1
        self.wait_for(lambda: self.process.said()[1].count("MOMENT\n") >= self.moments)

    def interrupt(self) -> None:
        """The terminal signals the whole group: the workers too."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, list[str]]:
        """The exit status, stdout, and the lines of stderr that are no progress bar."""
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err
        lines = err.replace("\r", "\n").splitlines()
        lines = [line.split("]")[-1] for line in lines if "MOMENT" not in line and "[transformers]" not in line]
        assert "Exception" not in err
        return self.process.returncode, out, [line.strip() for line in lines if line.strip()]


Start = Callable[..., Command]


@pytest.fixture
def start(warm_python: WarmPython) -> Start:
    """Start a command; `moment` is a line of Python that prints MOMENT when the command is where the signal shall meet
    it.
    """

    def command(arguments: list[Any], moment: str = "") -> Command:
        return Command(warm_python.start(START.format(moment=moment), arguments))

    return command


def long(settings: dict[str, Any], **changes: Any) -> list[str]:
    more_images(settings)
    return keys(settings, steps=100_000, num_workers=2, sample_images=0, validate_every=10**6, **changes)


def half_files(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name or ".unfinished" in p.name]


def test_a_second_ctrl_c_stops_a_training_without_saving(settings: dict[str, Any], start: Start) -> None:
    output = Path(settings["output"])
    moment = AT.format(module="ipadapter_trainer.training.steps", name="Progress", seconds=1)
    command = start(["train", *long(settings, save_every=2)], moment)
    command.wait_for(lambda: bool(checkpoint_folders(output)))
    command.wait_for_moment()
    saved = checkpoint_folders(output)
    command.interrupt()
    time.sleep(0.2)
    command.interrupt()
    status, out, lines = command.end()
    assert status == 130
    newest = checkpoint_folders(output)[-1]
    assert lines == [f"Stopped without saving. Run the same command again to resume from {newest}."]
    assert newest.name <= f"checkpoint-{int(saved[-1].name.removeprefix('checkpoint-')) + 2:06d}"
    assert out.count("Stopping after this step; Ctrl-C again stops at once, without saving.") == 1
    assert half_files(output) == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_models_load(settings: dict[str, Any], start: Start, times: int) -> None:
    moment = AT.format(module="ipadapter_trainer.models.base_model", name="load_base_model", seconds=5)
    moment += (
        "\nimport ipadapter_trainer.models.from_config\nipadapter_trainer.models.from_config.load_base_model = slow"
    )
    command = start(["train", *long(settings)], moment)
    command.wait_for_moment()
    for _ in range(times):
        command.interrupt()
    status, _, lines = command.end()
    assert (status, lines) == (130, ["Stopped."])
    assert half_files(Path(settings["output"])) == []


def test_ctrl_c_twice_while_a_checkpoint_is_saved(settings: dict[str, Any], start: Start) -> None:
    output = Path(settings["output"])
    moment = """
import time, ipadapter_trainer.training.checkpoints as module
original, calls = module._write, []
def slow(*arguments, **options):
    original(*arguments, **options)
    calls.append(1)
    if len(calls) == 2:
        print("MOMENT", file=sys.stderr, flush=True)
        time.sleep(20)
module._write = slow
"""
    command = start(["train", *long(settings, save_every=1)], moment)
    command.wait_for_moment()
    command.interrupt()
    time.sleep(0.2)
    command.interrupt()
    status, _, lines = command.end()
    assert (status, [f.name for f in checkpoint_folders(output)]) == (130, ["checkpoint-000001"])
    last = output / "checkpoint-000001"
    assert lines == [f"Stopped without saving. Run the same command again to resume from {last}."]
    assert half_files(output) == []


# A library that is interrupted may raise an error of its own instead.
ANOTHER_ERROR = """
interrupted = module.verify_export
def in_a_library(*arguments, **options):
    try:
        return interrupted(*arguments, **options)
    except KeyboardInterrupt:
        raise RuntimeError("broken off")
module.verify_export = in_a_library
"""


@pytest.mark.parametrize("library", ["", ANOTHER_ERROR])
def test_ctrl_c_while_the_finished_training_is_exported(settings: dict[str, Any], start: Start, library: str) -> None:
    output = Path(settings["output"])
    moment = AT.format(module="ipadapter_trainer.files.writing", name="verify_export", seconds=20) + library
    command = start(["train", *keys(settings, steps=1)], moment)
    command.wait_for_moment()
    command.interrupt()
    status, _, lines = command.end()
    assert status == 130
    complete = f"Stopped; the training is complete, in {output / 'checkpoint-000001'}."
    assert lines == [f"{complete} Run the same command again to export it."]
    assert half_files(output) == []
    assert list(output.glob("*.safetensors")) == []


def test_ctrl_c_while_a_cache_is_written(settings: dict[str, Any], start: Start, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    moment = AT.format(module="ipadapter_trainer.cache.encode", name="encode_moments", seconds=0.2)
    arguments = keys(settings, cache=cache, num_workers=2, batch_size=1, cache_variants=4, crop="random")
    command = start(["cache", *arguments], moment)
    command.wait_for_moment()
    command.interrupt()
    command.interrupt()
    status, _, lines = command.end()
    assert status == 130
    assert lines[-1] == "Stopped; the shards that are written stay. Run the same command again to resume."
    assert half_files(cache) == []
    assert list(cache.glob("captions/*.safetensors"))


def test_ctrl_c_while_a_image_is_generated(model_folder: Path, start: Start, tmp_path: Path) -> None:
    moment = AT.format(module="ipadapter_trainer.evaluation.generate_images", name="load_base_model", seconds=1)
    arguments = ["generate", f"base_model={model_folder}", f"output={tmp_path / 'o.png'}", "num_inference_steps=1000"]
    command = start(arguments, moment)
    command.wait_for_moment()
    command.interrupt()
    command.interrupt()
    status, _, lines = command.end()
    assert (status, lines[-1]) == (130, "Stopped.")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_demo(tmp_path: Path, start: Start) -> None:
    moment = AT.format(module="ipadapter_trainer.demo.run", name="load_images", seconds=0.5)
    command = start(["demo", "--output", tmp_path / "o.png"], moment)
    command.wait_for_moment()
    command.interrupt()
    command.interrupt()
    status, _, lines = command.end()
    assert (status, lines[-1]) == (130, "Stopped.")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_cannot_stop_ends_at_the_second_ctrl_c(model_folder: Path, start: Start, tmp_path: Path) -> None:
    """Such as one that hangs in a library's cleaning up."""
    moment = """
import time, ipadapter_trainer.evaluation.generate_images as module
def stuck(*arguments, **options):
    try:
        print("MOMENT", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        print("MOMENT", file=sys.stderr, flush=True)
        time.sleep(60)
module.load_base_model = stuck
"""
    command = start(["generate", f"base_model={model_folder}", f"output={tmp_path / 'o.png'}"], moment)
    command.wait_for_moment()
    command.interrupt()
    command.wait_for_moment()
    time.sleep(1.2)
    command.interrupt()
    began = time.monotonic()
    status, _, _ = command.end()
    assert status == 130
    assert time.monotonic() - began < 5


def test_a_command_in_the_background_ignores_ctrl_c(model_folder: Path, start: Start, tmp_path: Path) -> None:
    moment = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    moment += AT.format(module="ipadapter_trainer.evaluation.generate_images", name="load_base_model", seconds=0.5)
    command = start(
        ["generate", f"base_model={model_folder}", f"output={tmp_path / 'o.png'}", "num_inference_steps=1"], moment
    )
    command.wait_for_moment()
    command.interrupt()
    status, out, _ = command.end()
    assert (status, out.strip()) == (0, f"Saved {tmp_path / 'o.png'}")
