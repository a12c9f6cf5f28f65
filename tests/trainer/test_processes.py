"""Two processes over gloo are one process with the same global batch."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

from .conftest import training_settings, write_images
from .warm_python import WarmPython, process_environment

# Without a GPU the processes meet over gloo on the CPU.
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def losses_of(output: str | Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (Path(output) / "log.jsonl").open()])


@pytest.fixture(scope="module")
def alone(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a training that one process has done."""
    folder = tmp_path_factory.mktemp("alone")
    data = write_images(folder / "images")
    rows = []
    for number, image in enumerate(sorted(data.glob("*.png"))):
        torch.save(torch.nn.functional.one_hot(torch.tensor(number), 512).float(), data / f"{image.stem}.pt")
        rows.append({"file_name": image.name, "text": image.stem, "id_embed_file": f"{image.stem}.pt"})
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = training_settings(small_folder, data, folder / "run")
    settings |= {"steps": 5, "flip": True, "gradient_accumulation_steps": 2, "ema_decay": 0.5, "kind": "faceid-plusv2"}
    settings |= {"batch_size": 4}
    train(make_config(settings))
    return settings


def launch(
    launcher: str, warm_python: WarmPython, settings: dict[str, Any], *options: str
) -> subprocess.CompletedProcess[str]:
    arguments = [f"{key}={value}" for key, value in settings.items()]
    python = str(warm_python.executable)
    launched = subprocess.run(
        [python, "-m", *LAUNCHERS[launcher], "-m", "ipadapter_trainer.cli", "train", *arguments, *options],
        # PYTHON_EXEC is the Python of the workers.
        env={**process_environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    return launched


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_with_the_same_global_batch(
    launcher: str, alone: dict[str, Any], tmp_path: Path, warm_python: WarmPython
) -> None:
    """The same images, noise and timesteps, whoever draws them; sums differ in their order only."""
    one = load_file(next(Path(alone["output"]).glob("*.safetensors")))
    launched = launch(launcher, warm_python, {**alone, "batch_size": 2, "output": tmp_path})
    assert "2 processes" in launched.stdout
    assert launched.stdout.count("Saved ") == 1
    two = load_file(next(tmp_path.glob("*.safetensors")))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)  # five steps of 1e-3
    torch.testing.assert_close(losses_of(tmp_path), losses_of(alone["output"]), atol=1e-5, rtol=1e-4)


def test_a_dry_run_counts_the_images_of_both_processes(
    alone: dict[str, Any], tmp_path: Path, warm_python: WarmPython
) -> None:
    settings = {key: value for key, value in alone.items() if key != "steps"}
    settings |= {"batch_size": 1, "epochs": 4, "output": tmp_path}
    printed = launch("torchrun", warm_python, settings, "--dry-run").stdout
    images = int(re.search(r"data +(\d+) images to train on", printed)[1])  # pyright: ignore[reportOptionalSubscript]
    assert f"steps       {images} of 4 images: {4 * images} images" in printed
    assert printed.count("images to train on") == 1
