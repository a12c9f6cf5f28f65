"""Everything that is checked before the first weight of a frozen model is read; `train` and its dry run share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from ..data.check import is_inside
from ..errors import CheckpointError, ConfigError
from ..files.opening import checkpoint_folders, step_of
from ..models.base_model import BaseModel
from ..models.from_config import base_model_from_config
from ..runtime.processes import check_precision, launched_on_cpu
from ..settings.config import TrainConfig
from .changes import changed_settings, run_settings
from .checkpoints import Position, read_run_settings
from .new_adapter import adapter_spec, read_initial_adapter
from .objective import Objective, new_objective
from .optimizers import check_optimizer
from .outlook import outlook
from .run_log import tracker_arguments
from .training_data import TrainingData, open_training_data


@dataclass(frozen=True, eq=False)
class Checked:
    """A training that may start: its parts, none of which has read a weight, and what there is to tell about it."""

    config: TrainConfig
    accelerator: Accelerator
    base_model: BaseModel
    objective: Objective
    source: TrainingData
    checkpoint: Path | None  # to resume from
    start: Position
    changes: Sequence[str]  # since the checkpoint
    warnings: Sequence[str]

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return total_steps(self.config, self.source.size, self.images_per_batch)

    @property
    def images_per_batch(self) -> int:
        """Images in one batch of all processes."""
        return self.config.batch_size * self.accelerator.num_processes

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint of this training keeps, for those who resume from it."""
        return _facts(self.config, self.base_model, self.objective, self.source, self.accelerator)


def check_training(config: TrainConfig) -> Checked:
    """Check everything that can be known in advance, the cheapest first. The caller holds the output (`lock_folder`).

    Raises TrainerError or AdapterError as `train` would.
    """
    if is_inside(config.output, config.data):
        raise ConfigError(
            f"output {config.output} is inside data {config.data}, so the next training would read its samples. Choose "
            "a folder outside."
        )
    checkpoint = checkpoint_to_resume(config)
    check_optimizer(config.optimizer)
    check_precision(config.mixed_precision, PartialState(cpu=launched_on_cpu()).device)
    accelerator = Accelerator(
        cpu=launched_on_cpu(),
        mixed_precision="bf16" if config.mixed_precision == "fp8" else config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        **tracker_arguments(config.log_with, config.output),
    )
    base_model = base_model_from_config(config, accelerator.device)
    objective = new_objective(
        base_model.scheduler,
        prediction_type=config.prediction_type,
        min_snr_gamma=config.min_snr_gamma,
        zero_terminal_snr=config.zero_terminal_snr,
    )
    source = open_training_data(config, base_model, accelerator)
    if config.init_from is not None:
        read_initial_adapter(base_model, config.train_kind, config.num_tokens, config.init_from)
    images_per_batch = config.batch_size * accelerator.num_processes
    steps = total_steps(config, source.size, images_per_batch)
    if config.lr_warmup_steps >= steps:
        raise ConfigError(f"lr_warmup_steps={config.lr_warmup_steps} leave nothing of the {steps:,} steps.")
    start, changes = Position(), list[str]()
    if checkpoint is not None:
        start, before = read_run_settings(checkpoint)
        facts = _facts(config, base_model, objective, source, accelerator)
        changes = changed_settings(checkpoint, before, facts, config.accept_changes)
    tried, broken = source.try_images()
    if start.step >= steps:
        warnings = [_nothing_to_do(config, checkpoint, start.step, steps)]
    else:
        images_per_step = images_per_batch * config.gradient_accumulation_steps
        warnings = outlook(config, source.size, source.held_out_images, steps, images_per_step)
    if broken:
        shown = f"{'; '.join(broken[:3])}{' and more' if len(broken) > 3 else ''}"
        warnings.append(f"of {tried:,} images that were tried, {len(broken)} cannot be read: {shown}")
    return Checked(config, accelerator, base_model, objective, source, checkpoint, start, changes, warnings)


def notes(checked: Checked, resuming: str) -> list[str]:
    """What a user should know before the first step, a line each."""
    lines = [f"Warning: {warning}" for warning in checked.warnings]
    if checked.checkpoint is None:
        return lines
    named = checked.config.resume
    over = f", the newest in output, not from resume={named}" if named not in (True, checked.checkpoint) else ""
    found = f"{resuming} from {checked.checkpoint}{over}{', with changes:' if checked.changes else '.'}"
    return [found, *(f"  {change}" for change in checked.changes), *lines]


def total_steps(config: TrainConfig, size: int | None, images_per_batch: int) -> int:
    """Optimizer steps of the whole training on `size` images."""
    if config.steps is not None:
        return config.steps
    images_per_step = images_per_batch * config.gradient_accumulation_steps
    return math.ceil(float(config.epochs or 0) * (size or 0) / images_per_step)


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The newest checkpoint of the output; in an output without one, the one that `resume` names. So the same command
    resumes its own work, and a run that goes back to an older checkpoint leaves the later ones to their own output.

    Raises CheckpointError when there is none of that name, or one that must not be used.
    """
    folders, chosen = checkpoint_folders(config.output), config.resume
    if isinstance(chosen, bool):
        if folders and not chosen:
            raise CheckpointError(
                f"{config.output} already holds {folders[-1].name}. Choose another output, or resume=true."
            )
        return folders[-1] if folders else None
    siblings = checkpoint_folders(chosen.parent)
    if chosen not in siblings:
        inside = [str(folder) for folder in checkpoint_folders(chosen) or siblings]
        such = " or ".join(inside) or f"one such as {config.output / 'checkpoint-001000'}"
        raise CheckpointError(f"resume={chosen}: no complete checkpoint. Expected true, false or a folder: {such}.")
    later = [folder.name for folder in folders if step_of(folder) > step_of(chosen)]
    if chosen.parent.resolve() == config.output.resolve():
        if later:
            raise CheckpointError(
                f"{config.output} already goes on to {later[-1]}. To train on from {chosen.name} choose another "
                f"output, such as output={config.output}-from-{step_of(chosen)}; or delete {', '.join(later)}."
            )
        return chosen
    if folders and not later:
        raise CheckpointError(
            f"{config.output} holds {folders[-1].name}, which is not later than resume={chosen}. Choose another output."
        )
    return folders[-1] if folders else chosen


def _facts(
    config: TrainConfig, base_model: BaseModel, objective: Objective, source: TrainingData, accelerator: Accelerator
) -> dict[str, Any]:
    return run_settings(
        config,
        base_model,
        source,
        num_tokens=adapter_spec(base_model, config.train_kind, config.num_tokens).num_tokens,
        prediction_type=objective.prediction_type,
        processes=accelerator.num_processes,
    )


def _nothing_to_do(config: TrainConfig, checkpoint: Path | None, done: int, steps: int) -> str:
    """Raises CheckpointError where nothing was trained in this output, so that there is nothing to export either."""
    assert checkpoint is not None
    wanted = f"steps={steps}" if config.steps is not None else f"epochs={config.epochs:g} ({steps:,} steps)"
    found = f"{wanted}, but {checkpoint} has already done {done:,}"
    if checkpoint.parent.resolve() != config.output.resolve():
        raise CheckpointError(
            f"{found}. Raise steps to train on, or write its adapter with `ipadapter export {checkpoint}`."
        )
    return f"{found}: there is nothing to train, so its adapter is exported again. Raise steps to train on."
