"""What a third party raises, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ipadapter_trainer.cli.errors import user_errors

from .test_cli import ipadapter, keys


def message_of(fail: Callable[[], Any], capsys: pytest.CaptureFixture[str], **advice: str) -> str:
    with pytest.raises(typer.Exit) as raised, user_errors(**advice):
        fail()
    assert raised.value.exit_code == 2
    return capsys.readouterr().err


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB."


def test_memory_that_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    advice = "Lower batch_size (gradient_accumulation_steps makes up for it), set gradient_checkpointing=true or "
    advice += "mixed_precision=bf16, or train from a cache (`ipadapter cache`)."
    gpu = raising(torch.OutOfMemoryError(CUDA))
    assert message_of(gpu, capsys) == f"ipadapter: Out of memory (2.50 GiB more are needed). {advice}\n"
    assert message_of(lambda: torch.empty(2**58), capsys).startswith(
        f"ipadapter: Out of memory ({2**60} bytes more are needed). Lower batch_size"
    )
    blas = raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert message_of(blas, capsys) == f"ipadapter: Out of memory. {advice}\n"
    assert (
        message_of(lambda: bytearray(2**62), capsys, memory="Lower size.") == "ipadapter: Out of memory. Lower size.\n"
    )


class Killed(torch.utils.data.Dataset[int]):
    """Its worker is killed, as the system does when the memory is full."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        return row


def test_a_worker_that_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(lambda: list(DataLoader(Killed(), num_workers=1)), capsys)
    assert message.startswith("ipadapter: A data loader worker died (")
    assert message.endswith("/dev/shm is full. Lower num_workers (0 loads images in the main process) or batch_size.\n")


def test_what_safetensors_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    message = message_of(lambda: load_file(tmp_path / "a.safetensors"), capsys)
    assert message.startswith("ipadapter: ")
    assert message.count("\n") == 1
    assert message_of(raising(SafetensorError("Error\nof two lines")), capsys) == "ipadapter: Error of two lines\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), BrokenPipeError(32, "pipe")])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error


def test_a_training_that_runs_out_of_memory(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it happens in the command."""
    from ipadapter_trainer.training import steps as adapt_unet

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(adapt_unet.AdaptedUNet, "loss", full)
    code, _, err = ipadapter("train", *keys(settings))
    assert (code, "Traceback" in err) == (2, False)
    assert "ipadapter: Out of memory (2.50 GiB more are needed). Lower batch_size" in err
