"""`ipadapter train`: data -> features -> loss -> step -> log -> validate -> save, and the exported adapter at the end.

The loss is that of the paper (arXiv 2308.06721, eq. 3): || eps - eps_theta(x_t, c_text, c_image, t) ||^2, of which only
the adapter, which makes c_image, is trained (`AdaptedUNet`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files.opening import checkpoint_folders
from ..models.features import encode_batch
from ..report.verdict import validation_line
from ..runtime.disk import disk_errors
from ..runtime.folder_lock import lock_folder
from ..runtime.stopping import Interrupted, StopRequest, interruptions, stop_requests
from ..settings.config import TrainConfig
from .adapted_unet import AdaptedUNet, TrainBatch, adapt_unet
from .checkpoints import save_checkpoint
from .cuda_graphs import Backward, BatchTensors, GraphedBackward
from .finish import finish
from .run_log import RunLog, progress_postfix
from .setup import Say, Training, prepare, summary
from .steps import Progress, backward, check_loss, train_steps


def train(
    config: TrainConfig,
    *,
    say: Say = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_bar: bool = False,
) -> Path:
    """Run a training to its end and return the exported adapter file. `say` gets lines for the user.

    Raises TrainerError or AdapterError for everything the user can fix, and Interrupted after SIGINT or SIGTERM, with a
    checkpoint saved, and after a second SIGINT, without.
    """
    with lock_folder(config.output, say) as check_lock:

        def step_done(progress: Progress) -> None:
            check_lock()  # before anything is written
            on_progress(progress)

        training = prepare(config, say)
        say = _above_the_bar(say) if training.accelerator.is_main_process else lambda line: None
        with interruptions(lambda: _not_saved(config.output)):
            _train(training, say, step_done, progress_bar)
        with interruptions(lambda: _not_exported(config.output)):
            return finish(training, say)


def _train(training: Training, say: Say, on_progress: Callable[[Progress], None], progress_bar: bool) -> None:
    config, accelerator, state = training.config, training.accelerator, training.state
    say(summary(training))
    if training.validation is None:
        say(f"No validation: {_why_no_validation(training)}")
    adapted_unet = adapt_unet(training.base_model, training.adapter, training.objective)
    with stop_requests(say) as stop, closing(_open_log(training, say)) as log, adapted_unet as model:
        if state.step == 0:
            validate(training, model, log, say)
        start_batches, start_images = state.batches, state.images
        batches = loaded_batches(training)
        compute = compute_gradients(training, model)
        stream = train_steps(
            model,
            batches,
            optimizer=state.optimizer,
            steps=training.steps,
            start=state.step,
            schedule=training.schedule,
            accelerator=accelerator,
            max_grad_norm=config.max_grad_norm,
            compute=compute,
            keep_gradients=isinstance(compute, GraphedBackward),
        )
        hidden = not (progress_bar and accelerator.is_main_process)
        bar = tqdm(total=training.steps, initial=state.step, unit="step", dynamic_ncols=True, disable=hidden)
        with closing(batches), closing(stream), bar:
            for progress in stream:
                step, last = progress.step, progress.step == training.steps
                state.step, state.batches = step, start_batches + progress.batches
                state.images = start_images + progress.batches * training.images_per_batch
                state.average.update()
                log.add(progress)
                on_progress(progress)
                bar.update()
                if step % config.log_every == 0 or last:
                    line = log.write(float(training.schedule.get_last_lr()[0]))
                    bar.set_postfix(progress_postfix(line), refresh=False)
                if step % config.validate_every == 0 or last:
                    validate(training, model, log, say)
                stopping = _should_stop(training, stop)
                if step % config.save_every == 0 or last or stopping:
                    check_loss(step, float(progress.loss))
                    folder = save(training)
                    if stopping and not last:
                        raise Interrupted(f"Stopped; saved {folder}. Run the same command again to resume.")


def loaded_batches(training: Training) -> Generator[BatchTensors, None, None]:
    """Endless batches of this process, resumed where the training is."""
    for batch in training.data.batches(training.state.batches):
        yield BatchTensors({name: value for name, value in batch.items() if isinstance(value, Tensor)})


def compute_gradients(training: Training, model: AdaptedUNet) -> Backward:
    """Encodes a batch (with a cache there is nothing to encode), and computes loss and gradients."""
    spec = training.state.adapter.spec

    def compute(batch: BatchTensors) -> Tensor:
        tensors = batch.tensors
        features = encode_batch(training.base_model, tensors, spec)
        encoded = TrainBatch(features, tensors["drop_image_embeds"], tensors["noise"], tensors["timesteps"])
        return backward(model, encoded, training.accelerator)

    return GraphedBackward(compute, training.accelerator.device) if training.cuda_graphs else compute


def validate(training: Training, model: AdaptedUNet, log: RunLog, say: Say) -> None:
    """Losses and a grid of samples of the held-out images, by the main process; the other processes wait."""
    state, step = training.state, training.state.step
    if training.validation is not None and training.accelerator.is_main_process:
        unwrapped = dataclasses.replace(model, adapter=state.adapter)  # no other process takes part
        with state.average.applied():
            numbers = training.validation.measure(unwrapped)
            log.validation(step, numbers)
            say(validation_line(step, numbers))
            grid = training.validation.samples(state.adapter)
        if grid is not None:
            log.image(step, "samples", grid)
    training.accelerator.wait_for_everyone()


def save(training: Training) -> Path:
    """Write a checkpoint. Raises DiskError, which names the last good checkpoint."""
    output, state = training.config.output, training.state
    folder = output / f"checkpoint-{state.step:06d}"
    if training.accelerator.is_main_process:
        saved = checkpoint_folders(output)
        kept = f"the last good checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        need = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else state.size
        with disk_errors(folder, need, kept):
            folder = save_checkpoint(
                output,
                state,
                training.settings,
                metadata=training.metadata(),
                keep=training.config.keep_checkpoints,
            )
    training.accelerator.wait_for_everyone()
    return folder


def _open_log(training: Training, say: Say) -> RunLog:
    config = training.config
    # Written as a value of the user, it would be refused where graphs cannot be used.
    chosen = None if "cuda_graphs" in config.model_fields_set else {"cuda_graphs"}
    return RunLog(
        training.accelerator,
        config.output,
        config.model_dump(mode="json", exclude=chosen),
        config.log_with,
        training.state.step,
        warn=say,
    )


def _should_stop(training: Training, stop: StopRequest) -> bool:
    """Whether any process was asked to stop. Several processes agree only at log_every, since that waits for all."""
    accelerator = training.accelerator
    if accelerator.num_processes == 1:
        return stop.requested
    if training.state.step % training.config.log_every:
        return False
    asked: Any = accelerator.reduce(torch.tensor(float(stop.requested), device=accelerator.device), "sum")
    return bool(asked.item())


def _why_no_validation(training: Training) -> str:
    config, data = training.config, training.data
    if config.validation_images == 0:
        return "validation_images is 0."
    if data.size is None:
        return "the shards are a stream. Cache them (`ipadapter cache`) to have some of their images held out."
    if data.broken:
        return f"no held-out image can be read, such as {min(data.broken)}"
    return f"a tenth of the data is held out at most, and there are {data.size} images; 10 would do."


def _not_saved(output: Path) -> str:
    saved = checkpoint_folders(output)
    resume = f"Run the same command again to resume from {saved[-1]}." if saved else "There is no checkpoint yet."
    return f"Stopped without saving. {resume}"


def _not_exported(output: Path) -> str:
    complete = f"Stopped; the training is complete, in {checkpoint_folders(output)[-1]}."
    return f"{complete} Run the same command again to export it."


def _above_the_bar(say: Say) -> Say:
    """Print lines above the progress bar."""

    def write(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return write
