"""A TrainConfig -> everything that a training touches, loaded, resumed and ready to start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ipadapter_core import AdapterSpec

from ..engine.denoiser import adapter_spec, new_adapter
from ..engine.features import Features, encode_batch
from ..engine.inputs import open_base_model
from ..engine.objective import Objective, new_objective
from ..engine.optimizers import AveragedWeights, new_optimizer, new_schedule
from ..engine.processes import check_precision, launched_on_cpu
from ..errors import CheckpointError, ConfigError
from ..files.provenance import provenance
from ..models.base_model import BaseModel
from ..models.tuning import tune_unet
from ..monitor.trackers import tracker_arguments
from ..monitor.validation import Samples, Validation
from ..settings.config import TrainConfig
from .checkpoints import Identity, Position, State, checkpoint_folders, resume
from .sources import Source, open_source, prompt_picture, validation_batches

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a step touches. `adapter` and `state.optimizer` are prepared by the accelerator."""

    config: TrainConfig
    accelerator: Accelerator
    base_model: BaseModel
    objective: Objective
    adapter: Any  # an IPAdapter, or Accelerate's wrapper of one
    state: State
    schedule: LRScheduler
    source: Source
    validation: Validation | None
    start: Position
    unlogged: Tensor  # of a resumed run, see RunLog

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return total_steps(self.config, self.source.size, self.images_per_batch)

    @property
    def images_per_batch(self) -> int:
        """Pictures in one batch of all processes."""
        return self.config.batch_size * self.accelerator.num_processes

    @property
    def identity(self) -> Identity:
        """What a checkpoint says that it belongs to."""
        spec = self.state.adapter.spec
        return identify(self.config, self.base_model, spec, self.source, self.images_per_batch)

    def metadata(self, position: Position) -> dict[str, str]:
        """The provenance of the weights at this position."""
        return provenance(
            self.base_model,
            self.state.adapter.spec,
            prediction_type=self.objective.prediction_type,
            steps=position.step,
            images_seen=position.batches * self.images_per_batch,
            seed=self.config.seed,
            data_hash=self.source.data_hash,
            data_size=self.source.size,
        )


def prepare(config: TrainConfig, say: Say = lambda line: None) -> Training:
    """Load everything, in the order in which mistakes are cheapest to find, and resume when there is what to
    resume.
    """
    folders = _check_output(config)
    check_precision(config.mixed_precision, PartialState(cpu=launched_on_cpu()).device)
    accelerator = Accelerator(
        cpu=launched_on_cpu(),
        mixed_precision="bf16" if config.mixed_precision == "fp8" else config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        **tracker_arguments(config.log_with, config.output),
    )
    base_model = open_base_model(config, accelerator.device)
    objective = new_objective(
        base_model.scheduler,
        prediction_type=config.prediction_type,
        min_snr_gamma=config.min_snr_gamma,
        zero_terminal_snr=config.zero_terminal_snr,
    )
    source = open_source(config, base_model, accelerator)
    # Before the UNet and the optimizer take their memory.
    validation = _validation(config, base_model, objective, source)
    set_seed(config.seed)
    adapter = new_adapter(base_model, config.train_kind, config.tokens, config.init_from)
    optimizer = new_optimizer(adapter, config.learning_rate, config.weight_decay, config.optimizer)
    wrapped, optimizer = cast("Any", accelerator.prepare(adapter, optimizer))
    state = State(adapter, optimizer, AveragedWeights(adapter, optimizer, config.ema_decay))
    images_per_batch = config.batch_size * accelerator.num_processes
    start, unlogged = Position(), torch.zeros(2, 0)
    if folders:
        start, unlogged = resume(
            folders[-1], identify(config, base_model, adapter.spec, source, images_per_batch), state
        )
        if accelerator.is_main_process:
            say(f"Resuming from {folders[-1]}.")
    tune_unet(
        base_model,
        fp8=config.mixed_precision == "fp8",
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=config.compile,
    )
    return Training(
        config=config,
        accelerator=accelerator,
        base_model=base_model,
        objective=objective,
        adapter=wrapped,
        state=state,
        schedule=new_schedule(
            optimizer,
            config.lr_schedule,
            warmup_steps=config.warmup_steps,
            steps=total_steps(config, source.size, images_per_batch),
            done=start.step,
        ),
        source=source,
        validation=validation,
        start=start,
        unlogged=unlogged,
    )


def total_steps(config: TrainConfig, size: int | None, images_per_batch: int) -> int:
    """Optimizer steps of the whole training on `size` pictures."""
    if config.steps is not None:
        return config.steps
    images_per_step = images_per_batch * config.gradient_accumulation
    return math.ceil(float(config.epochs or 0) * (size or 0) / images_per_step)


def identify(
    config: TrainConfig, base_model: BaseModel, spec: AdapterSpec, source: Source, images_per_batch: int
) -> Identity:
    """What a checkpoint of this training must agree with."""
    encoder = f"{base_model.encoder_name} {base_model.encoder_fingerprint()}" if config.train_kind.takes_image else ""
    geometry = {name: getattr(config, name) for name in ("crop", "flip", "buckets", "reference_crop", "self_reference")}
    if config.streams:  # another number of them deals the shards otherwise
        processes = images_per_batch // config.batch_size
        geometry["shards"] = f"{processes} processes of {max(config.workers, 1)} workers"
    return Identity(
        kind=config.kind,
        base_model=base_model.fingerprint(),
        base_name=base_model.name,
        tokens=spec.tokens,
        image_encoder=encoder,
        optimizer=config.optimizer,
        seed=config.seed,
        resolution=config.resolution,
        geometry=json.dumps(geometry),
        images_per_batch=images_per_batch,
        data=source.data_hash,
        features=_features(config),
    )


def _features(config: TrainConfig) -> str:
    """Where the outputs of the frozen models come from, for messages."""
    if config.cache is None:
        return "the pictures"
    quantised = config.train_kind.takes_hidden_states and config.cache_image_features == "int8"
    return f"a cache of {config.cache_variants} variants{' with int8 image features' if quantised else ''}"


def summary(training: Training) -> str:
    """What is about to happen, for the user to check."""
    config, base_model, source = training.config, training.base_model, training.source
    parameters = sum(p.numel() for p in training.state.adapter.parameters())
    precisions = {"no": "float32", "bf16": "bfloat16 base", "fp16": "float16 base", "fp8": "8-bit base"}
    precision = precisions[config.mixed_precision]
    precision += "" if config.mixed_precision == "no" else ", float32 adapter"
    per_step = training.images_per_batch * config.gradient_accumulation
    size = "shards" if source.size is None else f"{source.size:,} pictures"
    epochs = "" if source.size is None else f" ({training.steps * per_step / source.size:.1f} epochs in all)"
    processes = training.accelerator.num_processes
    return (
        f"Training {parameters / 1e6:.2f} M parameters: {training.state.adapter.spec.describe()}\n"
        f"  base model  {base_model.name} ({training.objective.prediction_type}), {base_model.device}, "
        f"{precision}{'' if processes == 1 else f', {processes} processes'}\n"
        f"  data        {size} at {config.resolution} px, {per_step} per step"
        f"{', features from the cache' if source.cached else ''}\n"
        f"  steps       {training.start.step:,} to {training.steps:,}{epochs}\n"
        f"  output      {config.output}"
    )


def _check_output(config: TrainConfig) -> list[Path]:
    """The checkpoints to resume from. Raises ConfigError or CheckpointError when the output cannot be used."""
    folders = checkpoint_folders(config.output)
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"output {config.output} is a file. Choose a folder.")
    if folders and not config.resume:
        raise CheckpointError(
            f"{config.output} already holds {folders[-1].name}. Choose another output, or resume=true."
        )
    return folders


def _validation(config: TrainConfig, base_model: BaseModel, objective: Objective, source: Source) -> Validation | None:
    """The held-out pictures, encoded; with a cache the encoders then leave the memory."""
    if not source.held_out:
        return None
    spec = adapter_spec(base_model, config.train_kind, config.tokens)
    batches = validation_batches(config, base_model, source.held_out)
    features = Features.cat([encode_batch(base_model, batch, spec) for batch in batches])
    sample = None
    if config.sample_pictures:
        shown = source.held_out[: config.sample_pictures]
        sample = Samples(
            [(prompt_picture(example), example.text) for example in shown],
            text=config.sample_text,
            steps=config.sample_steps,
            scheduler=objective.scheduler,
        )
    validation = Validation(base_model, features, sample=sample, chunk=config.batch_size)
    if source.cached:
        base_model.release("vae", "text_encoders", "image_encoder")
    return validation
