"""kill -9 at any moment, start again: the same training, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ipadapter_trainer.files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

from .warm_python import WarmPython

KILLS, STEPS = 20, 100
# The trainings are forked off one process, so that twenty starts do not import everything twenty times.
KILLER = """
import json, os, pathlib, random, signal, sys, time
import torch
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

torch.set_num_threads(1)
settings, kills = json.loads(sys.argv[1]), int(sys.argv[2])
random.seed(0)

def start():
    started, says = os.pipe()
    child = os.fork()
    if child == 0:
        train(make_config(settings), on_progress=lambda progress: os.write(says, b"."))
        os._exit(0)
    os.close(says)
    return child, started

for kill in range(kills):
    child, started = start()
    if random.random() < 0.8:
        steps = random.randint(1, 6)  # so that no life lasts beyond its second checkpoint
        for _ in range(steps):
            began = time.monotonic()
            os.read(started, 1)
        time.sleep(random.uniform(0, time.monotonic() - began))  # anywhere in what follows the step, or in the next
    else:
        time.sleep(random.uniform(0, 0.5))  # while it loads and resumes
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(started)
    if not os.WIFSIGNALED(status):
        sys.exit(f"the training ended by itself after {kill} kills ({status})")
if not list(pathlib.Path(settings["output"]).glob("checkpoint-*")):
    sys.exit("no life lasted until a checkpoint")
child, _ = start()
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_twenty_kills_leave_the_training_as_it_would_have_been(
    settings: dict[str, Any], small_folder: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    """Weights, average, optimizer, random states, position and the loss curve, with everything on that could differ."""
    settings |= {
        "base_model": str(small_folder),
        "steps": STEPS,
        "save_every": 4,
        "log_every": 2,  # a checkpoint does not keep losses that are not logged yet
        "keep_checkpoints": 2,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 5,
        "flip": True,
        "crop": "random",
        "noise_offset": 0.1,
        "validate_every": 1000,
    }
    train(make_config({**settings, "output": str(tmp_path / "whole")}))
    killed = warm_python.start(KILLER, [json.dumps({**settings, "output": str(tmp_path / "killed")}), str(KILLS)])
    _, err = killed.communicate()
    assert killed.returncode == 0, err[-2000:]

    whole, other = (checkpoint_folders(tmp_path / name)[-1] for name in ("whole", "killed"))
    assert equal(load_file(whole / ADAPTER_FILE), load_file(other / ADAPTER_FILE))
    assert equal(*(torch.load(folder / STATE_FILE, weights_only=True) for folder in (whole, other)))
    assert equal(*(load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "killed")))
    curves = [
        [(line["step"], line["loss"]) for line in map(json.loads, (tmp_path / name / "log.jsonl").open())]
        for name in ("whole", "killed")
    ]
    assert [step for step, _ in curves[0]] == [*range(2, STEPS + 1, 2)]
    assert curves[0] == curves[1]
    assert len(checkpoint_folders(tmp_path / "killed")) == 2
    assert not list((tmp_path / "killed").glob(".unfinished*"))
