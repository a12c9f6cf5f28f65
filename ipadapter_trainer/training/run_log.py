"""The log of a run: log.jsonl, the sample images, and Accelerate's trackers (TensorBoard, wandb, trackio).

output/config.toml              the settings; `ipadapter train config.toml` repeats the run
output/log.jsonl                a line per `RunLog.write` or `RunLog.validation`
output/samples/step-000200.png  an image per `RunLog.image`
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, DiskError
from ..report.run_files import CONFIG_FILE, LOG_FILE, append_line, drop_past, image_file, replace_text, to_toml
from ..runtime.disk import disk_errors, whole_file
from .steps import Progress, check_loss

log = logging.getLogger(__name__)

PROJECT = "ip-adapter-kit"  # in wandb and trackio; a run has the name of its output folder
TENSORBOARD = "tensorboard"  # also the folder of its files


def tracker_arguments(log_with: str, output: Path) -> dict[str, Any]:
    """Arguments of an `Accelerator` for the tracker "tensorboard", "wandb" or "trackio"; "none" needs none.

    Raises ConfigError if its package is not installed; Accelerate would silently ignore it.
    """
    if log_with == "none":
        return {}
    try:
        version(log_with)
    except PackageNotFoundError:
        raise ConfigError(
            f"log_with={log_with} needs {log_with}. Install it with `pip install {log_with}`, or set log_with=none; "
            f"{LOG_FILE} and the report are written anyway."
        ) from None
    return {"log_with": log_with, "project_dir": str(output)}


class RunLog:
    """Log of a run. All processes call `add` and `write`; only the main process writes files and trackers.

    A failure to log never stops the training: the line or image is skipped, with one warning until it works again.

    Lines, samples and TensorBoard points after the step `start` come from a run that was killed after its last
    checkpoint; they are deleted. In wandb and trackio each resume is a new run of the same group. `config`: the
    settings by name. The accelerator was made with `tracker_arguments`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        config: Mapping[str, Any],
        log_with: str,
        start: int,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self._accelerator, self._output, self._log_with = accelerator, output, log_with
        self._warn, self._failing = warn, set[str]()
        self._losses, self._norms, self._images = list[Tensor](), list[Tensor](), 0
        self._step = start
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            drop_past(output, start)
            replace_text(output / CONFIG_FILE, to_toml(config))
        if log_with != "none":
            _start_tracker(accelerator, output, config, log_with, start)
        self._since = self._idle_since = time.monotonic()

    def add(self, progress: Progress) -> None:
        """Add a step to the next line, without waiting for the device."""
        self._losses.append(progress.loss)
        if progress.grad_norm is not None:
            self._norms.append(progress.grad_norm)
        self._images += progress.images
        self._step = progress.step
        self._idle_since = time.monotonic()

    def write(self, learning_rate: float) -> dict[str, float]:
        """Write and return a line about the steps since the last one: mean loss and gradient norm, images per second
        of all processes, and the memory in GB of the process that uses most.

        All processes call it at the same steps. Raises DivergedError if the loss is not finite.
        """
        device = self._accelerator.device
        loss = torch.stack(self._losses).mean().float().to(device)
        counts = torch.tensor([float(self._images), _memory(device)], device=device)
        gathered: Any = self._accelerator.gather(torch.cat([loss[None], counts])[None])
        losses, images, memory = gathered.T.tolist()  # waits for the device, so the clock is read after it
        now = time.monotonic()
        line: dict[str, float] = {
            "step": self._step,
            "loss": check_loss(self._step, sum(losses) / len(losses)),
            "learning_rate": learning_rate,
            "images_per_second": round(sum(images) / max(now - self._since, 1e-9), 3),
            "memory_gb": round(max(memory), 3),
        }
        if self._norms:
            line["grad_norm"] = torch.stack(self._norms).mean().item()
        self._append(line, prefix="train/")
        self._losses, self._norms, self._images = [], [], 0
        self._since = self._idle_since = time.monotonic()
        return line

    def validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a line of validation numbers; their names begin with "validation/". The time since the last step
        does not count for images per second.
        """
        self._append({"step": step, **numbers})
        self._skip_time()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image as output/<name>/step-000200.png and send it to the trackers."""
        if self._accelerator.is_main_process:
            file = image_file(self._output, name, step)
            with self._optional(str(file.parent)), whole_file(file) as temporary:
                image.save(temporary)
            for tracker in self._accelerator.trackers:
                with self._optional(tracker.name):
                    _log_image(tracker, step, name, image)
        self._skip_time()

    def close(self) -> None:
        """Let the trackers finish. Not `Accelerator.end_training`, which would end the process group as well."""
        for tracker in self._accelerator.trackers:
            with self._optional(tracker.name):
                tracker.finish()

    def _append(self, line: Mapping[str, float], prefix: str = "") -> None:
        if not self._accelerator.is_main_process:
            return
        file = self._output / LOG_FILE
        with self._optional(str(file)), disk_errors(file):
            append_line(file, json.dumps(line))
        numbers = {prefix + name: value for name, value in line.items() if name != "step"}
        for tracker in self._accelerator.trackers:
            with self._optional(tracker.name):
                tracker.log(numbers, step=int(line["step"]))

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # trackers raise anything
            if what not in self._failing:
                reason = error.problem if isinstance(error, DiskError) else f"{what}: {type(error).__name__}: {error}"
                self._warn(f"Warning: {' '.join(reason.split())}. The training continues; its log has a gap.")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def _skip_time(self) -> None:
        now = time.monotonic()
        self._since += now - self._idle_since
        self._idle_since = now


def progress_postfix(line: Mapping[str, float]) -> dict[str, str]:
    """The numbers of a `RunLog.write` line that the progress bar shows."""
    return {
        "loss": f"{line['loss']:.4f}",
        "img/s": f"{line['images_per_second']:.3g}",
        "memory": f"{line['memory_gb']:.1f} GB",
    }


def _start_tracker(
    accelerator: Accelerator, output: Path, config: Mapping[str, Any], log_with: str, start: int
) -> None:
    name = output.resolve().name
    run = {"name": name if start == 0 else f"{name} from step {start}", "group": name}
    if log_with == TENSORBOARD:
        # No hyperparameters: TensorBoard would show them as another run for every resume.
        purged = start + 1 if start else 0
        threading.excepthook = _report_thread
        accelerator.init_trackers(TENSORBOARD, init_kwargs={TENSORBOARD: {"purge_step": purged}})
        if accelerator.is_main_process:
            writer: Any = accelerator.get_tracker(TENSORBOARD, unwrap=True)
            writer.add_text("settings", "\n".join(f"    {line}" for line in to_toml(config).splitlines()), start)
        return
    options = {"wandb": {**run, "dir": str(output)}, "trackio": run}
    accelerator.init_trackers(PROJECT, dict(config), {log_with: options[log_with]})


def _report_thread(problem: Any) -> None:
    """Print errors of threads, except TensorBoard's writer: the next `log` raises its errors again."""
    if type(problem.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(problem)


def _log_image(tracker: Any, step: int, name: str, image: Image.Image) -> None:
    if tracker.name == "trackio":
        import trackio  # pyright: ignore[reportMissingImports] - optional

        tracker.log({name: trackio.Image(image)}, step=step)
    elif tracker.name == TENSORBOARD:
        tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({name: [image]}, step=step)


def _memory(device: torch.device) -> float:
    """GB: the peak of PyTorch's GPU memory, or on the CPU the current memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
