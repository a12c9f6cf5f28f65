"""Load what `check_training` approved: the adapter, its optimizer, the checkpoint to resume, and the validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LRScheduler

from ..data.images import open_rgb
from ..files.provenance import provenance
from ..models.features import Features, encode_batch
from ..models.prepare_unet import prepare_unet
from ..runtime.folder_lock import Say
from ..settings.config import TrainConfig
from .checkpoints import State, resume
from .checks import Checked, check_training, notes
from .new_adapter import adapter_spec, new_adapter
from .optimizers import AveragedWeights, new_optimizer, new_schedule
from .resume import run_settings
from .training_data import validation_batches
from .validation import Samples, Validation


@dataclass(frozen=True, eq=False)
class Training(Checked):
    """A checked training whose weights are loaded. `adapter` and `state.optimizer` are prepared by the accelerator."""

    settings: Mapping[str, Any]  # the `run_settings` that a checkpoint stores
    adapter: Any  # an IPAdapter, or Accelerate's wrapper of one
    state: State
    schedule: LRScheduler
    validation: Validation | None

    def metadata(self) -> dict[str, str]:
        """The provenance of the current weights, for the metadata of a file."""
        return provenance(
            self.base_model,
            self.state.adapter.spec,
            prediction_type=self.objective.prediction_type,
            steps=self.state.step,
            images_seen=self.state.images,
            seed=self.config.seed,
            data_hash=self.data.data_hash,
            data_size=self.data.size,
        )


def prepare(config: TrainConfig, say: Say = lambda line: None) -> Training:
    """Check everything, load everything, and resume if there is a checkpoint. `say` gets lines for the user.

    Raises TrainerError or AdapterError as `train`.
    """
    checked = check_training(config)
    accelerator, base_model = checked.accelerator, checked.base_model
    validation = _validation(checked)  # first: it needs the encoders, which then leave the memory
    set_seed(config.seed)
    adapter = new_adapter(base_model, config.train_kind, config.num_tokens, config.init_from)
    optimizer = new_optimizer(adapter, config.learning_rate, config.weight_decay, config.optimizer)
    wrapped, optimizer = cast("Any", accelerator.prepare(adapter, optimizer))
    # Accelerate would convert the adapter's outputs to float32, only for every layer to cast them back.
    accelerator.unwrap_model(adapter, keep_fp32_wrapper=False)
    state = State(adapter, optimizer, AveragedWeights(adapter, optimizer, config.ema_decay))
    if checked.checkpoint is not None:
        resume(checked.checkpoint, state)
        state.batches = checked.start_batches
    if accelerator.is_main_process:
        for line in notes(checked, "Resuming"):
            say(line)
    prepare_unet(
        base_model,
        fp8=config.mixed_precision == "fp8",
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=config.compile,
    )
    schedule = new_schedule(
        optimizer,
        config.lr_scheduler,
        lr_warmup_steps=config.lr_warmup_steps,
        steps=checked.steps,
        done=state.step,
    )
    settings = run_settings(config, base_model, checked.objective, checked.data, accelerator.num_processes)
    return Training(
        **vars(checked), settings=settings, adapter=wrapped, state=state, schedule=schedule, validation=validation
    )


def summary(training: Training) -> str:
    """The training in five lines, for the user to check."""
    config, base_model, data = training.config, training.base_model, training.data
    parameters = sum(p.numel() for p in training.state.adapter.parameters())
    precisions = {"no": "float32", "bf16": "bfloat16 base", "fp16": "float16 base", "fp8": "8-bit base"}
    precision = precisions[config.mixed_precision]
    precision += "" if config.mixed_precision == "no" else ", float32 adapter"
    per_step = training.images_per_batch * config.gradient_accumulation_steps
    size = "shards" if data.size is None else f"{data.size:,} images"
    epochs = ""
    if data.batches_per_epoch is not None:
        more = (training.steps - training.start_step) * config.gradient_accumulation_steps / data.batches_per_epoch
        epochs = f" ({training.start_epochs + more:.1f} epochs in all)"
    processes = training.accelerator.num_processes
    return (
        f"Training {parameters / 1e6:.2f} M parameters: {training.state.adapter.spec.describe()}\n"
        f"  base model  {base_model.name} ({training.objective.prediction_type}), {base_model.device}, "
        f"{precision}{'' if processes == 1 else f', {processes} processes'}\n"
        f"  data        {size} at {config.resolution} px, {per_step} per step"
        f"{', features from the cache' if data.cached else ''}\n"
        f"  steps       {training.start_step:,} to {training.steps:,}{epochs}"
        f"{', as CUDA graphs' if training.cuda_graphs else ''}\n"
        f"  output      {config.output}"
    )


def _validation(checked: Checked) -> Validation | None:
    """Encode the held-out images. A training from a cache then releases the encoders."""
    config, base_model, held_out = checked.config, checked.base_model, checked.data.held_out
    if not held_out:
        return None
    spec = adapter_spec(base_model, config.train_kind, config.num_tokens)
    batches = validation_batches(config, base_model, held_out)
    features = Features.cat([encode_batch(base_model, batch, spec) for batch in batches])
    samples = None
    if config.sample_images:
        samples = Samples(
            [(open_rgb(example.prompt_image)[0], example.text) for example in held_out[: config.sample_images]],
            text=config.sample_prompt,
            steps=config.sample_steps,
            scheduler=checked.objective.scheduler,
        )
    validation = Validation(base_model, features, sample=samples, chunk=config.batch_size)
    if checked.data.cached:
        base_model.release("vae", "text_encoders", "image_encoder")
    return validation
