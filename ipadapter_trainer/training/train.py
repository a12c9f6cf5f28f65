"""`ipadapter train`: from a TrainConfig to an adapter file, with checkpoints, logs, validation and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files.opening import checkpoint_folders
from ..models.features import encode_batch
from ..report.verdict import validation_line
from ..runtime.disk import disk_errors
from ..runtime.folder_lock import lock_folder
from ..runtime.stopping import Interrupted, StopRequest, interruptions, stop_requests
from ..settings.config import TrainConfig
from .adapted_unet import AdaptedUNet, TrainBatch, adapt_unet
from .checkpoints import Position, save_checkpoint
from .finish import finish
from .run_log import RunLog, progress_postfix
from .setup import Say, Training, prepare, summary
from .steps import Progress, check_loss, train_steps


def train(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_bar: bool = False,
) -> Path:
    """Run a training to its end and return the exported adapter file. `say` gets the lines meant for people.

    Raises TrainerError or AdapterError for everything the user can put right, and Interrupted after SIGINT or SIGTERM,
    with a checkpoint saved, and after a second SIGINT, without.
    """
    with lock_folder(config.output, say) as check_claim:

        def step_done(progress: Progress) -> None:
            check_claim()  # before anything is written
            on_progress(progress)

        training = prepare(config, say)
        say = _above_the_bar(say) if training.accelerator.is_main_process else _silent
        with interruptions(lambda: _not_saved(config.output)):
            position = _train(training, say, step_done, progress_bar)
        with interruptions(lambda: _complete(config.output)):
            return finish(training, position, say)


def _not_saved(output: Path) -> str:
    saved = checkpoint_folders(output)
    resume = f"Run the same command again to resume from {saved[-1]}." if saved else "There is no checkpoint yet."
    return f"Stopped without saving. {resume}"


def _complete(output: Path) -> str:
    complete = f"Stopped; the training is complete, in {checkpoint_folders(output)[-1]}."
    return f"{complete} Run the same command again to export it."


def _train(training: Training, say: Say, on_progress: Callable[[Progress], None], progress_bar: bool) -> Position:
    config, accelerator, position = training.config, training.accelerator, training.start
    step = position.step
    say(summary(training))
    if training.validation is None:
        say(f"No validation: {_why_no_validation(training)}")
    model_in_training = adapt_unet(training.base_model, training.adapter, training.objective)
    with stop_requests(say) as stop, closing(_open_log(training, say)) as log, model_in_training as model:
        if step == 0:
            _validate(training, model, log, step, say)
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
                position = training.position(step, progress.batches)
                training.state.average.update()
                log.add(progress)
                on_progress(progress)
                bar.update()
                if step % config.log_every == 0 or last:
                    line = log.write(training.schedule.get_last_lr()[0])
                    bar.set_postfix(progress_postfix(line), refresh=False)
                if step % config.validate_every == 0 or last:
                    _validate(training, model, log, step, say)
                stopping = _agree_to_stop(training, stop, step)
                if step % config.save_every == 0 or last or stopping:
                    check_loss(step, float(progress.loss))
                    folder = save(training, position)
                    if stopping and not last:
                        raise Interrupted(f"Stopped; saved {folder}. Run the same command again to resume.")
    return position


def training_batches(training: Training) -> Iterator[TrainBatch]:
    """Endless encoded batches of this process, from the start position on."""
    spec = training.state.adapter.spec
    for batch in training.source.batches(training.start.batches):
        features = encode_batch(training.base_model, batch, spec)
        yield TrainBatch(features, batch["drop_image_embeds"], batch["noise"], batch["timesteps"])


def save(training: Training, position: Position) -> Path:
    """Write the checkpoint of a step that was just done. Raises DiskError that names the last good one."""
    output = training.config.output
    folder = output / f"checkpoint-{position.step:06d}"
    if training.accelerator.is_main_process:
        saved = checkpoint_folders(output)
        kept = f"the last good checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        need = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else training.state.size
        with disk_errors(folder, need, kept):
            folder = save_checkpoint(
                output,
                position,
                training.checked.facts,
                training.state,
                metadata=training.metadata(position),
                keep=training.config.keep_checkpoints,
            )
    training.accelerator.wait_for_everyone()
    return folder


def _why_no_validation(training: Training) -> str:
    config, source = training.config, training.source
    if config.validation_images == 0:
        return "validation_images is 0."
    if source.size is None:
        return "the shards are a stream. Cache them (`ipadapter cache`) to have some of their images held out."
    if source.broken:
        return f"no held-out image can be read, such as {min(source.broken)}"
    return f"a tenth of the data is held out at most, and there are {source.size} images; 10 would do."


def _open_log(training: Training, say: Say) -> RunLog:
    config = training.config
    return RunLog(
        training.accelerator,
        config.output,
        config.model_dump(mode="json"),
        config.log_with,
        training.start.step,
        warn=say,
    )


def _validate(training: Training, model: AdaptedUNet, log: RunLog, step: int, say: Say) -> None:
    """Numbers and images of the held-out examples, by the main process; the others wait."""
    if training.validation is not None and training.accelerator.is_main_process:
        alone = dataclasses.replace(model, adapter=training.state.adapter)  # no other process takes part
        with training.state.average.applied():
            numbers = training.validation.measure(alone)
            log.validation(step, numbers)
            say(validation_line(step, numbers))
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


def _above_the_bar(say: Say) -> Say:
    """Lines that leave the progress bar whole."""

    def written(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return written


def _silent(line: str) -> None:
    pass
