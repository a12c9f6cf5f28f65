"""Checkpoints of a training: the adapter as any host loads it, and beside it what an exact resume needs.

    output/checkpoint-000200/adapter.safetensors   the published layout; the averaged weights where there are such
                             training.pt           optimizer, average, position, settings

A checkpoint appears under its name by one rename, so whatever has that name is complete.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipadapter_core import AdapterError, IPAdapter, load_adapter, read_checkpoint

from ..errors import CheckpointError
from ..files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders
from ..files.provenance import export_adapter
from .optimizers import AveragedWeights

_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Position:
    """How far the training is: optimizer steps done, batches (of all processes together) used, and images in them."""

    step: int = 0
    batches: int = 0
    images: int = 0


@dataclass(frozen=True, eq=False)
class State:
    """Everything that changes while training. The optimizer may be Accelerate's wrapper of one, with a loss scaler."""

    adapter: IPAdapter
    optimizer: torch.optim.Optimizer
    average: AveragedWeights

    @property
    def size(self) -> int:
        """Bytes of a checkpoint, but for a few KB."""
        values = [value for group in self.optimizer.state.values() for value in group.values()]
        tensors = [*self.adapter.parameters(), *(value for value in values if isinstance(value, Tensor))]
        weights = sum(p.numel() * p.element_size() for p in self.adapter.parameters())
        return sum(t.numel() * t.element_size() for t in tensors) + (weights if self.average.exist else 0)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of a training in float16."""
        return getattr(self.optimizer, "scaler", None)


def save_checkpoint(
    output: Path,
    position: Position,
    facts: Mapping[str, Any],
    state: State,
    *,
    metadata: dict[str, str],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>`, then delete all but the newest `keep`. A step that is already saved stays as
    it is. `facts` are what `changes` compares.

    Raises AdapterError for weights that are not finite, and what the disk raises (see `disk_errors`); older checkpoints
    stay.
    """
    target = output / f"checkpoint-{position.step:06d}"
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
            "position": asdict(position),
            "facts": dict(facts),
            "weights": state.adapter.state_dict() if state.average.exist else {},  # else adapter.safetensors has them
            "optimizer": state.optimizer.state_dict(),
            "scaler": {} if state.scaler is None else state.scaler.state_dict(),
            "average": state.average.state_dict(),
        }
        _write(temporary / STATE_FILE, content)
        if target.exists():  # the name without the files: not ours, or damaged
            target.rename(output / f"damaged-{target.name}-{secrets.token_hex(4)}")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoint_folders(output)[:-keep]:
        # Renamed first: a deletion that is cut short must not leave something that looks complete.
        doomed = old.rename(output / f"{_UNFINISHED}{old.name}-{secrets.token_hex(4)}")
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def read_run_settings(folder: Path) -> tuple[Position, Mapping[str, Any]]:
    """Where a checkpoint is, and what it was trained with; its tensors are not read.

    Raises CheckpointError when it cannot be read.
    """
    content = _read(folder, mmap=True)
    with _whole_adapter(folder):
        read_checkpoint(folder / ADAPTER_FILE)
    return Position(**content["position"]), content.get("facts", {})


def resume(folder: Path, state: State) -> None:
    """Put a checkpoint's state into a training that was built the same way. The optimizer keeps its learning rate and
    weight decay, which the settings may have changed.

    Raises CheckpointError when it cannot be read.
    """
    content = _read(folder)
    kept = ("lr", "initial_lr", "weight_decay")
    settings = [{k: group[k] for k in kept if k in group} for group in state.optimizer.param_groups]
    with _whole_adapter(folder):
        weights = content["weights"] or load_adapter(folder / ADAPTER_FILE, dtype=torch.float32).state_dict()
    state.adapter.load_state_dict(weights)
    state.optimizer.load_state_dict(content["optimizer"])
    for group, setting in zip(state.optimizer.param_groups, settings, strict=True):
        group.pop("initial_lr", None)  # the schedule takes it from lr
        group.update(setting)
    if state.scaler is not None and content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.average.load_state_dict(content["average"])


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
def _whole_adapter(folder: Path) -> Iterator[None]:
    """The advice for a file that was downloaded is none for a checkpoint."""
    try:
        yield
    except AdapterError as error:
        file = folder / ADAPTER_FILE
        raise _damaged(file, str(error).removeprefix(f"{file}: ").partition(". ")[0]) from error


def _damaged(file: Path, reason: str) -> CheckpointError:
    earlier = checkpoint_folders(file.parent.parent)[:-1]
    advice = f"resume from {earlier[-1].name}" if earlier else "start again"
    return CheckpointError(f"{file}: damaged ({reason}). Delete {file.parent} to {advice}.")
