"""`ipadapter train`: from a TrainConfig to adapter.safetensors, with checkpoints, log and progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ipadapter_core import IPAdapter

from .base_model import BaseModel, load_base_model
from .checkpoints import ADAPTER_FILE, Identity, Position, checkpoint_folders, resume, save_checkpoint
from .config import TrainConfig
from .data import PictureDataset, Recipe, loader
from .engine import Progress, TrainingBatch, check_loss, new_adapter, new_optimizer, train_steps
from .errors import CheckpointError, ConfigError, DataError
from .examples import Example, find_examples, fingerprint
from .features import encode_batch
from .loss_log import LOG_FILE, LossLog
from .provenance import export_adapter, provenance
from .stopping import stop_requests


class Interrupted(Exception):
    """The user, or the system, asked the training to stop; it saved `checkpoint` first."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped after saving {checkpoint}")
        self.checkpoint = checkpoint


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a step touches. `adapter` and `optimizer` are prepared by the accelerator."""

    config: TrainConfig
    accelerator: Accelerator
    base_model: BaseModel
    adapter: IPAdapter
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    examples: list[Example]
    data_hash: str
    start: Position
    broken: set[str] = field(default_factory=set[str])

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        if self.config.steps is not None:
            return self.config.steps
        return math.ceil(float(self.config.epochs or 0) * len(self.examples) / self.images_per_step)

    @property
    def images_per_step(self) -> int:
        """Pictures in one optimizer step."""
        return self.config.batch_size * self.config.gradient_accumulation

    def position(self, step: int) -> Position:
        """Where the training is after `step` steps."""
        return Position(step, self.start.draws + (step - self.start.step) * self.images_per_step)

    def metadata(self, step: int) -> dict[str, str]:
        """The provenance of the weights after `step` steps."""
        return provenance(
            self.base_model,
            steps=step,
            images_seen=self.position(step).draws,
            seed=self.config.seed,
            data_hash=self.data_hash,
            data_size=len(self.examples),
        )


def train(
    config: TrainConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_bar: bool = False,
) -> Path:
    """Run a training to its end and return the exported adapter file. `say` gets the lines meant for people.

    Raises TrainerError or AdapterError for everything the user can put right, and Interrupted, with a
    checkpoint saved, after SIGINT or SIGTERM.
    """
    training = prepare(config, say)
    say(summary(training))
    step = training.start.step
    if step >= training.steps:
        say(f"{step:,} steps are done already; raise steps to train on. Exporting again.")
    batches = encoded(training)
    stream = train_steps(
        training.base_model,
        training.adapter,
        batches,
        optimizer=training.optimizer,
        generator=training.generator,
        steps=training.steps,
        start=step,
        accelerator=training.accelerator,
        max_grad_norm=config.max_grad_norm,
    )
    log = LossLog(config.output / LOG_FILE, step)
    bar = tqdm(total=training.steps, initial=step, unit="step", dynamic_ncols=True, disable=not progress_bar)
    with stop_requests(say) as stop, closing(batches), closing(stream), bar:
        for progress in stream:
            step = progress.step
            log.add(progress)
            on_progress(progress)
            bar.update()
            last = step == training.steps
            if step % config.log_every == 0 or last:
                line = log.write()
                shown = {"loss": f"{line['loss']:.4f}", "img/s": f"{line['images_per_second']:.1f}"}
                bar.set_postfix(shown, refresh=False)
            if step % config.save_every == 0 or last or stop.requested:
                check_loss(step, float(progress.loss))
                folder = save(training, step)
                if stop.requested and not last:
                    raise Interrupted(folder)
    if training.broken:
        say(f"{len(training.broken)} pictures could not be read and were skipped, such as {min(training.broken)}")
    return export_adapter(config.output / ADAPTER_FILE, training.adapter, training.metadata(step))


def prepare(config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> Training:
    """Load everything, in the order in which mistakes are cheapest to find, and resume when there is what to
    resume.
    """
    folders = checkpoint_folders(config.output)
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"output {config.output} is a file. Choose a folder.")
    if folders and not config.resume:
        raise CheckpointError(
            f"{config.output} already holds {folders[-1].name}. Choose another output, or resume=true."
        )
    examples = find_examples(config.data, config.data_root)
    root = config.data_root or (config.data if config.data.is_dir() else config.data.parent)
    data_hash = fingerprint(examples, root)

    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched; this version trains in one. Start it plainly, with "
            "`ipadapter train`."
        )
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    base_model = load_base_model(config.base_model, dtype, accelerator.device, config.image_encoder)
    _check_resolution(config, base_model)
    set_seed(config.seed)
    adapter = new_adapter(base_model, config.tokens, config.init_from)
    optimizer = new_optimizer(adapter, config.learning_rate, config.weight_decay)
    adapter, optimizer = cast("Any", accelerator.prepare(adapter, optimizer))
    generator = torch.Generator().manual_seed(config.seed)
    start = Position()
    if folders:
        identity = identify(config, base_model, data_hash)
        start = resume(folders[-1], identity, accelerator.unwrap_model(adapter), optimizer, generator)
        say(f"Resuming from {folders[-1]}.")
    return Training(config, accelerator, base_model, adapter, optimizer, generator, examples, data_hash, start)


def identify(config: TrainConfig, base_model: BaseModel, data_hash: str) -> Identity:
    """What a checkpoint of this training must agree with."""
    return Identity(
        kind=config.kind,
        base_model=base_model.fingerprint(),
        base_name=base_model.name,
        tokens=config.tokens,
        image_encoder=f"{base_model.encoder_name} {base_model.encoder_fingerprint()}",
        seed=config.seed,
        resolution=config.resolution,
        data=data_hash,
    )


def summary(training: Training) -> str:
    """What is about to happen, for the user to check."""
    config, base_model = training.config, training.base_model
    spec = training.accelerator.unwrap_model(training.adapter).spec
    parameters = sum(p.numel() for p in training.adapter.parameters())
    precision = "bfloat16 base, float32 adapter" if config.mixed_precision == "bf16" else "float32"
    return (
        f"Training {parameters / 1e6:.2f} M parameters: {spec.describe()}\n"
        f"  base model  {base_model.name} ({base_model.prediction_type}), {base_model.device}, {precision}\n"
        f"  data        {len(training.examples):,} pictures at {config.resolution} px, "
        f"{training.images_per_step} per step\n"
        f"  steps       {training.start.step:,} to {training.steps:,} "
        f"({training.steps * training.images_per_step / len(training.examples):.1f} epochs in all)\n"
        f"  output      {config.output}"
    )


def encoded(training: Training) -> Generator[TrainingBatch, None, None]:
    """Endless encoded batches from the start position on; unreadable pictures are collected in `broken`."""
    config = training.config
    recipe = Recipe(
        config.resolution,
        config.seed,
        config.flip,
        config.image_dropout,
        config.text_dropout,
        config.both_dropout,
    )
    dataset = PictureDataset(training.examples, training.base_model, recipe)
    on_gpu = training.accelerator.device.type == "cuda"
    try:
        for batch in loader(dataset, config, training.start.draws, pin=on_gpu):
            training.broken.update(batch["broken"])
            yield encode_batch(training.base_model, batch, training.generator), batch["drop_image_embeds"]
    except DataError as error:
        # From a worker it comes with the worker's traceback in its text; the last line is the message.
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from error


def save(training: Training, step: int) -> Path:
    """Write the checkpoint of a step that was just done."""
    return save_checkpoint(
        training.config.output,
        training.position(step),
        identify(training.config, training.base_model, training.data_hash),
        training.accelerator.unwrap_model(training.adapter),
        optimizer=training.optimizer,
        generator=training.generator,
        metadata=training.metadata(step),
        keep=training.config.keep_checkpoints,
    )


def _check_resolution(config: TrainConfig, base_model: BaseModel) -> None:
    if config.resolution % base_model.latent_scale:
        raise ConfigError(
            f"resolution = {config.resolution}: expected a multiple of {base_model.latent_scale}, the pixels per "
            f"latent of {base_model.name}."
        )
