"""Two processes over gloo are one process with the same global batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train

from .warm_python import process_environment

# Without a GPU the processes meet over gloo on the CPU.
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_with_the_same_global_batch(
    launcher: str, settings: dict[str, Any], small_folder: Path, tmp_path: Path
) -> None:
    """The same images, noise and timesteps, whoever draws them; sums differ in their order only."""
    settings |= {"steps": 5, "flip": True, "gradient_accumulation_steps": 2, "ema_decay": 0.5, "kind": "faceid-plusv2"}
    settings |= {"base_model": str(small_folder)}
    folder = Path(settings["data"])
    rows = []
    for number, image in enumerate(sorted(folder.glob("*.png"))):
        torch.save(torch.nn.functional.one_hot(torch.tensor(number), 512).float(), folder / f"{image.stem}.pt")
        rows.append({"file_name": image.name, "text": image.stem, "id_embed_file": f"{image.stem}.pt"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    one = load_file(train(make_config({**settings, "batch_size": 4, "output": tmp_path / "one"})))
    arguments = [f"{key}={value}" for key, value in {**settings, "batch_size": 2, "output": tmp_path / "two"}.items()]
    launched = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "ipadapter_trainer.cli", "train", *arguments],
        env={**process_environment(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "2 processes" in launched.stdout
    assert launched.stdout.count("Saved ") == 1
    two = load_file(next((tmp_path / "two").glob("*.safetensors")))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)  # five steps of 1e-3
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    torch.testing.assert_close(*(torch.tensor(curve) for curve in losses), atol=1e-5, rtol=1e-4)
