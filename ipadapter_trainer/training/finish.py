"""The end of a training: export the adapter, verify the file, and write the verdict and the report."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ipadapter_core import AdapterError, load_adapter

from ..errors import DiskError, ExportError, TrainerError
from ..files.opening import checkpoint_folders
from ..files.provenance import export_adapter
from ..files.published import published_name
from ..files.verify import verify_with_diffusers
from ..report.page import write_report
from ..report.run_files import read_log
from ..report.verdict import read_verdict
from .setup import Say, Training, summary


def finish(training: Training, say: Say) -> Path:
    """Export the adapter, load the file with diffusers, and write the report. Only a failed export is an error: if
    diffusers or the report fails, the file stays and `say` gets a warning.

    Raises ExportError, which names the command that exports the last checkpoint.
    """
    config, spec = training.config, training.state.adapter.spec
    file = config.output / published_name(spec)
    broken = sorted({line for lines in gather_object([list(training.data.broken)]) for line in lines})
    if training.accelerator.is_main_process:
        _export(training, file)
        if broken:
            say(f"{len(broken)} images could not be read and were skipped, such as {broken[0]}")
        again = _export_command(training, file, config.export_dtype)
        try:
            verify_with_diffusers(file, load_adapter(file, shortcut=spec.shortcut))
        except Exception as error:  # a bug in diffusers must not cost the file
            inspect = shlex.join(["ipadapter", "inspect", str(file)])
            say(
                f"Warning: {_in_a_line(error)} The file is kept, since ipadapter_core reads back what was written. "
                f"`{inspect}` shows what it is; `{again}` checks it again."
            )
        validations = read_log(config.output)[1]
        if validations:
            say(f"Verdict: {read_verdict(validations)[1]}")
        try:
            say(f"Report: {write_report(config.output, summary(training))}")
        except Exception as error:  # nor one in matplotlib
            report = shlex.join(["ipadapter", "report", str(config.output)])
            say(f"Warning: the report was not written ({_in_a_line(error)}). `{report}` writes it.")
        say(f"Saved {file}")
    training.accelerator.wait_for_everyone()
    return file


def _export(training: Training, file: Path) -> None:
    config = training.config
    try:
        with training.state.average.applied():
            export_adapter(
                file,
                training.state.adapter,
                training.metadata(),
                dtype=getattr(torch, config.export_dtype),
                verify=True,
                with_diffusers=False,  # done by `finish`, once the file is there
            )
    except (TrainerError, AdapterError) as error:
        # Values outside the range or precision of float16 fit float32.
        dtype = config.export_dtype if isinstance(error, DiskError) else "float32"
        raise ExportError(
            f"{error} The training is complete; its last checkpoint exports with "
            f"`{_export_command(training, file, dtype)}`."
        ) from error


def _export_command(training: Training, file: Path, dtype: str) -> str:
    checkpoint = checkpoint_folders(training.config.output)[-1]
    options = [f"--dtype={dtype}"] * (dtype != "float16") + ["--force"] * file.exists()
    return shlex.join(["ipadapter", "export", str(checkpoint), str(file), *options])


def _in_a_line(error: Exception) -> str:
    text = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 400, placeholder=" ...")
