"""All checks before the first weight of a frozen model is read, shared by `train` and its dry run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from ipadapter_core import AdapterSpec

from ..data.check import is_inside
from ..errors import ConfigError
from ..files.opening import checkpoint_folders
from ..files.published import published_name
from ..models.base_model import BaseModel
from ..models.from_config import base_model_from_config
from ..report.run_files import CONFIG_FILE, LOG_FILE, REPORT_FILE, sample_files
from ..runtime.processes import check_precision, launched_on_cpu
from ..settings.config import TrainConfig
from .checkpoints import read_run_settings
from .new_adapter import adapter_spec, read_initial_adapter
from .objective import Objective, new_objective
from .optimizers import check_optimizer
from .resume import changed_settings, checkpoint_to_resume, nothing_to_do, resume_at, run_settings
from .run_log import tracker_arguments
from .training_data import TrainingData, open_training_data

# The paper trained from scratch on 10 million images. For the tiny emoji model a thousand suffice to see that the
# adapter follows its image prompt; a few hundred it memorises.
FEW_IMAGES = 1000
# The paper saw each image 6 times. The config sd15-plus-finetune sees each of 100 images 160 times and advises to stop
# earlier; several times that memorises them, whatever the learning rate.
MANY_EPOCHS = 500

FINE_TUNE = "sd15-plus-finetune"


@dataclass(frozen=True, eq=False)
class Checked:
    """A training whose settings and data are fine. No weight of a frozen model has been read."""

    config: TrainConfig
    accelerator: Accelerator
    base_model: BaseModel
    objective: Objective
    data: TrainingData
    steps: int  # optimizer steps in all
    images_per_batch: int  # in one batch of all processes
    checkpoint: Path | None  # to resume from
    start_step: int
    start_batches: int  # the number of the next batch, of all processes
    start_epochs: float  # that are done; 0 for a stream
    changes: Sequence[str]  # of settings since that checkpoint
    warnings: Sequence[str]
    cuda_graphs: bool


def check_training(config: TrainConfig) -> Checked:
    """Check everything that can be checked in advance, cheap checks first. The caller holds the lock of the output
    (`lock_folder`).

    Raises TrainerError or AdapterError as `train` would.
    """
    if is_inside(config.output, config.data):
        raise ConfigError(
            f"output {config.output} is inside data {config.data}, so the next training would read its samples. Choose "
            "a folder outside."
        )
    checkpoint = checkpoint_to_resume(config)
    check_optimizer(config.optimizer)
    device: Any = PartialState(cpu=launched_on_cpu()).device
    check_precision(config.mixed_precision, device)
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
    data = open_training_data(config, base_model, accelerator)
    if config.init_from is not None:
        read_initial_adapter(base_model, config.train_kind, config.num_tokens, config.init_from)
    images_per_batch = config.batch_size * accelerator.num_processes
    start_step, start_batches, start_epochs, changes = 0, 0, 0.0, list[str]()
    if checkpoint is not None:
        position, before = read_run_settings(checkpoint)
        now = run_settings(config, base_model, objective, data, accelerator.num_processes)
        changes = changed_settings(checkpoint, before, now, config.accept_changes)
        start_step, (start_batches, start_epochs) = position.step, resume_at(position, before, now)
        if start_batches != position.batches and data.batches_per_epoch is not None:
            changes.append("the images or their order changed, so it goes on with a new epoch")
    _check_files(config, adapter_spec(base_model, config.train_kind, config.num_tokens))
    steps = total_steps(config, data.batches_per_epoch, start_step, start_epochs)
    if config.lr_warmup_steps >= steps:
        raise ConfigError(f"lr_warmup_steps={config.lr_warmup_steps} leave nothing of the {steps:,} steps.")
    tried, broken = data.try_images()
    if checkpoint is not None and start_step >= steps:
        warnings = [nothing_to_do(config, checkpoint, start_step)]
    else:
        images_per_step = images_per_batch * config.gradient_accumulation_steps
        warnings = plan_warnings(config, data.size, data.held_out_images, steps, images_per_step)
    if config.self_reference and data.examples and not any(example.references for example in data.examples):
        warnings.append(
            f"self_reference={config.self_reference:g} has no effect: no row has a reference, so each image already is "
            "its own prompt"
        )
    if broken:
        shown = f"{'; '.join(broken[:3])}{' and more' if len(broken) > 3 else ''}"
        warnings.append(f"of {tried:,} images that were tried, {len(broken)} cannot be read: {shown}")
    return Checked(
        config=config,
        accelerator=accelerator,
        base_model=base_model,
        objective=objective,
        data=data,
        steps=steps,
        images_per_batch=images_per_batch,
        checkpoint=checkpoint,
        start_step=start_step,
        start_batches=start_batches,
        start_epochs=start_epochs,
        changes=changes,
        warnings=warnings,
        cuda_graphs=use_cuda_graphs(config, accelerator),
    )


def _check_files(config: TrainConfig, spec: AdapterSpec) -> None:
    """Refuse to replace files that no training of this output has written."""
    if (config.output / LOG_FILE).exists() or checkpoint_folders(config.output):
        return
    files = [config.output / name for name in (CONFIG_FILE, REPORT_FILE, published_name(spec))]
    for file in (*files, *sample_files(config.output).values()):
        if file.exists():
            raise ConfigError(
                f"{file} would be replaced, and it is not from a training of this output, which holds no {LOG_FILE}. "
                "Move it away, or choose another output."
            )


def use_cuda_graphs(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether the steps run as CUDA graphs (`cuda_graphs.GraphedBackward`).

    Raises ConfigError if they were asked for and cannot.
    """
    obstacles = {
        "on a CPU": accelerator.device.type != "cuda",
        "with several processes": accelerator.num_processes > 1,
        "with gradient_checkpointing=true": config.gradient_checkpointing,
        "with compile=true": config.compile,
        "with mixed_precision=fp16": config.mixed_precision == "fp16",  # its loss scale changes from step to step
    }
    found = [name for name, present in obstacles.items() if present]
    if found and config.cuda_graphs and "cuda_graphs" in config.model_fields_set:
        raise ConfigError(f"cuda_graphs=true does not work {found[0]}. Leave it out, or change that.")
    return config.cuda_graphs and not found


def notes(checked: Checked, resuming: str) -> list[str]:
    """Lines for the user before the first step: the checkpoint to resume from, changed settings, warnings."""
    lines = [f"Warning: {warning}" for warning in checked.warnings]
    if checked.checkpoint is None:
        return lines
    named = checked.config.resume
    over = f", the newest in output, not from resume={named}" if named not in (True, checked.checkpoint) else ""
    found = f"{resuming} from {checked.checkpoint}{over}{', with changes:' if checked.changes else '.'}"
    return [found, *(f"  {change}" for change in checked.changes), *lines]


def total_steps(config: TrainConfig, batches_per_epoch: int | None, done: int = 0, epochs: float = 0.0) -> int:
    """Optimizer steps of the whole training, of which `done` are done, in `epochs` epochs."""
    if config.steps is not None:
        return config.steps
    left = (float(config.epochs or 0) - epochs) * (batches_per_epoch or 0) / config.gradient_accumulation_steps
    return done + max(math.ceil(left - 1e-6), 0)  # 2.0000000001 steps are two


def plan_warnings(config: TrainConfig, size: int | None, held_out: int, steps: int, images_per_step: int) -> list[str]:
    """Warnings about a training of `steps` steps on `size` images (None: unknown) that will likely disappoint."""
    found: list[str] = []
    if size is not None:
        epochs = steps * images_per_step / size
        if size < FEW_IMAGES and config.init_from is None:
            found.append(
                f"{size:,} images do not train an adapter from scratch; that takes {FEW_IMAGES:,} at the very least. "
                f"Start from a published adapter with init_from=..., as the config {FINE_TUNE} does."
            )
        if epochs > MANY_EPOCHS:
            found.append(
                f"{steps:,} steps of {images_per_step:,} show each of the {size:,} images {epochs:,.0f} times; beyond "
                f"{MANY_EPOCHS} times they are learnt by heart. The config {FINE_TUNE} takes 2,000 steps of 8."
            )
        if images_per_step > size:
            found.append(
                f"A step takes {images_per_step:,} images, but there are only {size:,}: it sees them more than once. "
                "Lower batch_size or gradient_accumulation_steps."
            )
    if config.save_every > steps:
        found.append(f"save_every={config.save_every:,} is more than the {steps:,} steps: a crash costs all of them.")
    if held_out and config.validate_every > steps:
        found.append(
            f"validate_every={config.validate_every:,} is more than the {steps:,} steps: the validation runs at the "
            "start and at the end only."
        )
    return found
