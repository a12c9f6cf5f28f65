"""A TrainConfig -> everything that a training touches, loaded, resumed and ready to start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LRScheduler

from ..data.images import open_rgb
from ..files.provenance import provenance
from ..models.base_model import BaseModel
from ..models.features import Features, encode_batch
from ..models.prepare_unet import prepare_unet
from ..settings.config import TrainConfig
from .checkpoints import Position, State, resume
from .checks import Checked, check_training, notes
from .new_adapter import adapter_spec, new_adapter
from .objective import Objective
from .optimizers import AveragedWeights, new_optimizer, new_schedule
from .training_data import TrainingData, validation_batches
from .validation import Samples, Validation

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a step touches. `adapter` and `state.optimizer` are prepared by the accelerator."""

    config: TrainConfig
    checked: Checked
    accelerator: Accelerator
    base_model: BaseModel
    objective: Objective
    adapter: Any  # an IPAdapter, or Accelerate's wrapper of one
    state: State
    schedule: LRScheduler
    source: TrainingData
    validation: Validation | None
    start: Position

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.checked.steps

    @property
    def images_per_batch(self) -> int:
        """Images in one batch of all processes."""
        return self.checked.images_per_batch

    def position(self, step: int, batches: int) -> Position:
        """Where the training is after `step` steps and so many batches of this run."""
        return Position(step, self.start.batches + batches, self.start.images + batches * self.images_per_batch)

    def metadata(self, position: Position) -> dict[str, str]:
        """The provenance of the weights at this position."""
        return provenance(
            self.base_model,
            self.state.adapter.spec,
            prediction_type=self.objective.prediction_type,
            steps=position.step,
            images_seen=position.images,
            seed=self.config.seed,
            data_hash=self.source.data_hash,
            data_size=self.source.size,
        )


def prepare(config: TrainConfig, say: Say = lambda line: None) -> Training:
    """Check everything, then load everything, and resume when there is what to resume. `say` gets what a user should
    know before the first step.
    """
    checked = check_training(config)
    accelerator, base_model, objective = checked.accelerator, checked.base_model, checked.objective
    # Before the UNet and the optimizer take their memory.
    validation = _validation(config, base_model, objective, checked.source)
    set_seed(config.seed)
    adapter = new_adapter(base_model, config.train_kind, config.num_tokens, config.init_from)
    optimizer = new_optimizer(adapter, config.learning_rate, config.weight_decay, config.optimizer)
    wrapped, optimizer = cast("Any", accelerator.prepare(adapter, optimizer))
    # Accelerate makes the adapter's keys and values float32, and every layer would cast them back.
    accelerator.unwrap_model(adapter, keep_fp32_wrapper=False)
    state = State(adapter, optimizer, AveragedWeights(adapter, optimizer, config.ema_decay))
    if checked.checkpoint is not None:
        resume(checked.checkpoint, state)
    if accelerator.is_main_process:
        for line in notes(checked, "Resuming"):
            say(line)
    prepare_unet(
        base_model,
        fp8=config.mixed_precision == "fp8",
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=config.compile,
    )
    return Training(
        config=config,
        checked=checked,
        accelerator=accelerator,
        base_model=base_model,
        objective=objective,
        adapter=wrapped,
        state=state,
        schedule=new_schedule(
            optimizer,
            config.lr_scheduler,
            lr_warmup_steps=config.lr_warmup_steps,
            steps=checked.steps,
            done=checked.start.step,
        ),
        source=checked.source,
        validation=validation,
        start=checked.start,
    )


def summary(training: Training) -> str:
    """What is about to happen, for the user to check."""
    config, base_model, source = training.config, training.base_model, training.source
    parameters = sum(p.numel() for p in training.state.adapter.parameters())
    precisions = {"no": "float32", "bf16": "bfloat16 base", "fp16": "float16 base", "fp8": "8-bit base"}
    precision = precisions[config.mixed_precision]
    precision += "" if config.mixed_precision == "no" else ", float32 adapter"
    per_step = training.images_per_batch * config.gradient_accumulation_steps
    size = "shards" if source.size is None else f"{source.size:,} images"
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


def _validation(
    config: TrainConfig, base_model: BaseModel, objective: Objective, source: TrainingData
) -> Validation | None:
    """The held-out images, encoded; with a cache the encoders then leave the memory."""
    if not source.held_out:
        return None
    spec = adapter_spec(base_model, config.train_kind, config.num_tokens)
    batches = validation_batches(config, base_model, source.held_out)
    features = Features.cat([encode_batch(base_model, batch, spec) for batch in batches])
    sample = None
    if config.sample_images:
        shown = source.held_out[: config.sample_images]
        sample = Samples(
            [(open_rgb(example.prompt_image)[0], example.text) for example in shown],
            text=config.sample_prompt,
            steps=config.sample_steps,
            scheduler=objective.scheduler,
        )
    validation = Validation(base_model, features, sample=sample, chunk=config.batch_size)
    if source.cached:
        base_model.release("vae", "text_encoders", "image_encoder")
    return validation
