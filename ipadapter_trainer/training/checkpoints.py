"""Checkpoints: an adapter file that every host can load, and the state for an exact resume.

    output/checkpoint-000200/adapter.safetensors   published layout; the averaged weights if there is an average
                             training.pt           optimizer, loss scaler, average, position and settings

A checkpoint is written to a temporary folder and then renamed, so a folder of that name is always complete.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipadapter_core import AdapterError, IPAdapter, load_adapter, read_checkpoint

from ..errors import CheckpointError
from ..files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ..files.provenance import export_adapter
from .optimizers import AveragedWeights

_UNFINISHED = ".unfinished-"


class Position(NamedTuple):
    """How far a checkpoint's training is, as in `State`."""

    step: int
    batches: int
    images: int


@dataclass(eq=False)
class State:
    """Everything that changes during a training. The optimizer may be wrapped by Accelerate, with a loss scaler."""

    adapter: IPAdapter
    optimizer: torch.optim.Optimizer
    average: AveragedWeights
    step: int = 0  # optimizer steps done
    batches: int = 0  # used so far, by all processes together
    images: int = 0  # in these batches

    @property
    def size(self) -> int:
        """Approximate size of a checkpoint in bytes."""
        values = [value for group in self.optimizer.state.values() for value in group.values()]
        tensors = [*self.adapter.parameters(), *(value for value in values if isinstance(value, Tensor))]
        weights = sum(p.numel() * p.element_size() for p in self.adapter.parameters())
        return sum(t.numel() * t.element_size() for t in tensors) + (weights if self.average.exist else 0)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of a training in float16."""
        return getattr(self.optimizer, "scaler", None)


def save_checkpoint(
    output: Path, state: State, settings: Mapping[str, Any], *, metadata: dict[str, str], keep: int
) -> Path:
    """Write `checkpoint-<step>`, then delete all but the newest `keep`. A step that is already saved is not written
    again. `settings` are the `run_settings` that a resumed run is compared with.

    Raises AdapterError for weights that are not finite, and OSError and the like for the disk (see `disk_errors`);
    older checkpoints stay.
    """
    target = output / f"checkpoint-{state.step:06d}"
    if target in checkpoint_folders(output):
        return target
    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob(f"{_UNFINISHED}*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = output / f"{_UNFINISHED}{target.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        with state.average.applied():
            export_adapter(temporary / ADAPTER_FILE, state.adapter, metadata)
        content = {
            "position": {"step": state.step, "batches": state.batches, "images": state.images},
            "settings": dict(settings),
            "weights": state.adapter.state_dict()
            if state.average.exist
            else {},  # else they are in adapter.safetensors
            "optimizer": state.optimizer.state_dict(),
            "scaler": {} if state.scaler is None else state.scaler.state_dict(),
            "average": state.average.state_dict(),
        }
        _write(temporary / STATE_FILE, content)
        if target.exists():  # an incomplete folder of that name
            target.rename(output / f"damaged-{target.name}-{secrets.token_hex(4)}")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoint_folders(output)[:-keep]:
        # Renamed first: an interrupted deletion must not leave a folder that looks complete.
        unwanted = old.rename(output / f"{_UNFINISHED}{old.name}-{secrets.token_hex(4)}")
        shutil.rmtree(unwanted, ignore_errors=True)
    return target


def read_run_settings(folder: Path) -> tuple[Position, Mapping[str, Any]]:
    """The position of a checkpoint and the `run_settings` it was trained with; its tensors are not read.

    Raises CheckpointError when it cannot be read.
    """
    content = _read(folder, mmap=True)
    with _damaged_adapter(folder):
        read_checkpoint(folder / ADAPTER_FILE)
    return Position(**content["position"]), content.get("settings", {})


def resume(folder: Path, state: State) -> None:
    """Load a checkpoint into `state`, which was built with the same settings. The optimizer keeps its learning rate
    and weight decay, since the settings may have changed them.

    Raises CheckpointError when it cannot be read.
    """
    content = _read(folder)
    kept = ("lr", "initial_lr", "weight_decay")
    settings = [{k: group[k] for k in kept if k in group} for group in state.optimizer.param_groups]
    with _damaged_adapter(folder):
        weights = content["weights"] or load_adapter(folder / ADAPTER_FILE, dtype=torch.float32).state_dict()
    state.adapter.load_state_dict(weights)
    state.optimizer.load_state_dict(content["optimizer"])
    for group, setting in zip(state.optimizer.param_groups, settings, strict=True):
        group.pop("initial_lr", None)  # the schedule takes it from lr
        group.update(setting)
    if state.scaler is not None and content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.average.load_state_dict(content["average"])
    state.step, state.batches, state.images = Position(**content["position"])


def _write(file: Path, content: dict[str, Any]) -> None:
    with file.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _read(folder: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder / STATE_FILE, type(error).__name__) from error


@contextmanager
def _damaged_adapter(folder: Path) -> Iterator[None]:
    """Replace the core's advice, meant for downloaded files, by what to do about a checkpoint."""
    try:
        yield
    except AdapterError as error:
        file = folder / ADAPTER_FILE
        raise _damaged(file, str(error).removeprefix(f"{file}: ").partition(". ")[0]) from error


def _damaged(file: Path, reason: str) -> CheckpointError:
    earlier = checkpoint_folders(file.parent.parent)[:-1]
    advice = f"resume from {earlier[-1].name}" if earlier else "start again"
    return CheckpointError(f"{file}: damaged ({reason}). Delete {file.parent} to {advice}.")
