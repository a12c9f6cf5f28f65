"""Checkpoints of a training: the adapter as any host loads it, and beside it what an exact resume needs.

    output/checkpoint-000200/adapter.safetensors   the published layout; the averaged weights where there are such
                             training.pt           optimizer, average, random states, position, identity

A checkpoint appears under its name by one rename, so whatever has that name is complete.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipadapter_core import IPAdapter, load_adapter

from ..engine.optimizers import AveragedWeights
from ..errors import CheckpointError
from ..files.provenance import export_adapter

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = "training.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What must be the same for a resume to be the same training."""

    kind: str
    base_model: str  # BaseModel.fingerprint
    base_name: str = field(compare=False)  # for messages; a renamed folder is still the same model
    tokens: int
    image_encoder: str
    optimizer: str
    seed: int
    resolution: int
    geometry: str  # crops, flips and buckets
    images_per_batch: int  # of all processes together
    data: str
    features: str = field(compare=False)  # what the frozen models said, or the cache that keeps it: rounding only


@dataclass(frozen=True)
class Position:
    """How far the training is: optimizer steps done, and batches (of all processes together) used."""

    step: int = 0
    batches: int = 0


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


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints of an output folder, oldest first."""
    if not output.is_dir():
        return []
    found = [p for p in output.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted((p for p in found if (p / ADAPTER_FILE).is_file()), key=_step)


def save_checkpoint(
    output: Path,
    position: Position,
    identity: Identity,
    state: State,
    *,
    unlogged: Tensor,
    metadata: dict[str, str],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>`, then delete all but the newest `keep`. A step that is already saved stays as
    it is. `unlogged` are the numbers of steps that wait for a line of the log.

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
            "unlogged": unlogged.cpu(),
            "identity": asdict(identity),
            "weights": state.adapter.state_dict() if state.average.exist else {},  # else adapter.safetensors has them
            "optimizer": state.optimizer.state_dict(),
            "scaler": {} if state.scaler is None else state.scaler.state_dict(),
            "average": state.average.state_dict(),
            "random": _random_states(),
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


def resume(folder: Path, identity: Identity, state: State) -> tuple[Position, Tensor]:
    """Put a checkpoint's state into a training that was built the same way; random states are set too. The
    optimizer keeps its learning rate and weight decay, which the settings may have changed. Returns where the training
    was, and the numbers of the steps that wait for a line of the log.

    Raises CheckpointError when it belongs to another training (naming both values) or cannot be read.
    """
    content = _read(folder)
    check_identity(folder, content["identity"], identity)
    kept = ("lr", "initial_lr", "weight_decay")
    settings = [{k: group[k] for k in kept if k in group} for group in state.optimizer.param_groups]
    weights = content["weights"] or load_adapter(folder / ADAPTER_FILE, dtype=torch.float32).state_dict()
    state.adapter.load_state_dict(weights)
    state.optimizer.load_state_dict(content["optimizer"])
    for group, setting in zip(state.optimizer.param_groups, settings, strict=True):
        group.pop("initial_lr", None)  # the schedule takes it from lr
        group.update(setting)
    if state.scaler is not None and content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.average.load_state_dict(content["average"])
    _restore_random_states(content["random"])
    return Position(**content["position"]), content["unlogged"]


def check_identity(folder: Path, found: Mapping[str, Any], wanted: Identity) -> None:
    """Raises CheckpointError that names every difference between a checkpoint and this training; a difference of
    `features` alone is a warning.
    """
    now = asdict(wanted)
    compared = [f.name for f in fields(Identity) if f.compare]
    differences = [
        f"{key} was {_readable(key, found)} and is now {_readable(key, now)}"
        for key in compared
        if found.get(key) != now[key]
    ]
    if differences:
        raise CheckpointError(
            f"{folder} belongs to another training: {'; '.join(differences)}. Choose another output, with "
            f"init_from={folder / ADAPTER_FILE} to go on from its weights."
        )
    before = found.get("features", wanted.features)  # older checkpoints do not say
    if before != wanted.features:
        log.warning(
            "%s was trained on %s, this run goes on with %s: the same training but for rounding, not bit for bit.",
            folder,
            before,
            wanted.features,
        )


def _write(file: Path, content: dict[str, Any]) -> None:
    with file.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _readable(key: str, identity: Mapping[str, Any]) -> str:
    name = f" ({identity.get('base_name')})" if key == "base_model" else ""
    return f"{identity.get(key)!r}{name}"


def _read(folder: Path) -> dict[str, Any]:
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE}: damaged ({type(error).__name__}). Delete {folder} to resume from the one before."
        ) from error


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _random_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(states: Mapping[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    # A checkpoint may move between machines with another number of GPUs.
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
