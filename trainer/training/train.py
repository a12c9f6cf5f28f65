"""`ipadapter train`: from a TrainConfig to an adapter file, with checkpoints, logs, validation and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.claim import claim
from ..engine.denoiser import Denoiser, Progress, TrainingBatch, check_loss, denoiser, train_steps
from ..engine.features import encode_batch
from ..files.file_names import published_name
from ..files.provenance import export_adapter
from ..monitor.report import write_report
from ..monitor.trackers import RunLog, progress_postfix
from ..settings.config import TrainConfig
from .checkpoints import save_checkpoint
from .setup import Say, Training, prepare, summary
from .stopping import StopRequest, stop_requests


class Interrupted(Exception):
    """The user, or the system, asked the training to stop; it saved `checkpoint` first."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped after saving {checkpoint}")
        self.checkpoint = checkpoint


def train(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_bar: bool = False,
) -> Path:
    """Run a training to its end and return the exported adapter file. `say` gets the lines meant for people.

    Raises TrainerError or AdapterError for everything the user can put right, and Interrupted, with a
    checkpoint saved, after SIGINT or SIGTERM.
    """
    with claim(config.output, say) as check_claim:

        def step_done(progress: Progress) -> None:
            check_claim()  # before anything is written
            on_progress(progress)

        return _train(config, say, step_done, progress_bar)


def _train(config: TrainConfig, say: Say, on_progress: Callable[[Progress], None], progress_bar: bool) -> Path:
    training = prepare(config, say)
    accelerator, step = training.accelerator, training.start.step
    say = say if accelerator.is_main_process else _silent
    say(summary(training))
    model_in_training = denoiser(training.base_model, training.adapter, training.objective)
    with stop_requests(say) as stop, closing(_open_log(training)) as log, model_in_training as model:
        if step == 0:
            _validate(training, model, log, step)
        batches = training_batches(training)
        stream = train_steps(
            model,
            batches,
            optimizer=training.state.optimizer,
            steps=training.steps,
            start=step,
            schedule=training.schedule,
            accelerator=accelerator,
            max_grad_norm=config.max_grad_norm,
        )
        hidden = not (progress_bar and accelerator.is_main_process)
        bar = tqdm(total=training.steps, initial=step, unit="step", dynamic_ncols=True, disable=hidden)
        with closing(batches), closing(stream), bar:
            for progress in stream:
                step, last = progress.step, progress.step == training.steps
                training.state.average.update()
                log.add(progress)
                on_progress(progress)
                bar.update()
                if step % config.log_every == 0 or last:
                    line = log.write(training.schedule.get_last_lr()[0])
                    bar.set_postfix(progress_postfix(line), refresh=False)
                if step % config.validate_every == 0 or last:
                    _validate(training, model, log, step)
                stopping = _agree_to_stop(training, stop, step)
                if step % config.save_every == 0 or last or stopping:
                    check_loss(step, float(progress.loss))
                    folder = save(training, step, log.unlogged())
                    if stopping and not last:
                        raise Interrupted(folder)
    return finish(training, step, say)


def training_batches(training: Training) -> Iterator[TrainingBatch]:
    """Endless encoded batches of this process, from the start position on."""
    spec = training.state.adapter.spec
    for batch in training.source.batches(training.start.batches):
        features = encode_batch(training.base_model, batch, spec)
        yield TrainingBatch(features, batch["drop_image_embeds"], batch["noise"], batch["timesteps"])


def save(training: Training, step: int, unlogged: Tensor) -> Path:
    """Write the checkpoint of a step that was just done."""
    folder = training.config.output / f"checkpoint-{step:06d}"
    if training.accelerator.is_main_process:
        folder = save_checkpoint(
            training.config.output,
            training.position(step),
            training.checked.facts,
            training.state,
            unlogged=unlogged,
            metadata=training.metadata(step),
            keep=training.config.keep_checkpoints,
        )
    training.accelerator.wait_for_everyone()
    return folder


def finish(training: Training, step: int, say: Say) -> Path:
    """Export the adapter, check the file as other hosts will read it, and write the report."""
    config, spec = training.config, training.state.adapter.spec
    file = config.output / published_name(spec)
    broken = sorted({line for lines in gather_object([list(training.source.broken)]) for line in lines})
    if training.accelerator.is_main_process:
        if broken:
            say(f"{len(broken)} pictures could not be read and were skipped, such as {broken[0]}")
        with training.state.average.applied():
            export_adapter(
                file,
                training.state.adapter,
                training.metadata(step),
                dtype=getattr(torch, config.export_dtype),
                verify=True,
            )
        say(f"Report: {write_report(config.output, summary(training))}")
        say(f"Saved {file}")
    training.accelerator.wait_for_everyone()
    return file


def _open_log(training: Training) -> RunLog:
    config = training.config
    return RunLog(
        training.accelerator,
        config.output,
        config.model_dump(mode="json"),
        config.log_with,
        training.start.step,
        training.unlogged,
    )


def _validate(training: Training, model: Denoiser, log: RunLog, step: int) -> None:
    """Numbers and pictures of the held-out examples, by the main process; the others wait."""
    if training.validation is not None and training.accelerator.is_main_process:
        alone = dataclasses.replace(model, adapter=training.state.adapter)  # no other process takes part
        with training.state.average.applied():
            log.validation(step, training.validation.measure(alone))
            grid = training.validation.samples(training.state.adapter)
        if grid is not None:
            log.image(step, "samples", grid)
    training.accelerator.wait_for_everyone()


def _agree_to_stop(training: Training, stop: StopRequest, step: int) -> bool:
    """Whether any process was asked to stop; several agree only where they log, as agreeing waits for all."""
    accelerator = training.accelerator
    if accelerator.num_processes == 1:
        return stop.requested
    if step % training.config.log_every:
        return False
    asked = torch.tensor(float(stop.requested), device=accelerator.device)
    return bool(accelerator.reduce(asked, "sum").item())


def _silent(line: str) -> None:
    pass
