"""Launched processes, and the precision of their device."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

from ..errors import ConfigError

_TIMEOUT = timedelta(days=7)  # for each other, at the end of what some do slower


def launched_on_cpu() -> bool:
    """Whether Accelerate needs `cpu=True`: for several processes without a GPU, which it would not connect otherwise,
    or with `ACCELERATE_USE_CPU`, which its launcher sets and PartialState ignores.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available())


def connect(*, cuda_or_cpu: bool = False) -> PartialState:
    """The processes that share a work of which no step needs the others, until its end. `cuda_or_cpu`: on no other
    device, as `ipadapter generate`.
    """
    cpu = launched_on_cpu() or (cuda_or_cpu and not torch.cuda.is_available())
    return PartialState(cpu=cpu, timeout=_TIMEOUT)


def disconnect_at_exit() -> None:
    """Leave the processes of this launch before Python ends, if they are connected by Gloo. Its threads hold tensors,
    and a thread that gives one back while the interpreter ends aborts the process.
    """
    atexit.unregister(_disconnect)  # once is enough
    atexit.register(_disconnect)


def _disconnect() -> None:
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Raises ConfigError for a precision that the device does not support, and names one that it does."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("mixed_precision=fp16 needs a GPU, but this runs on the CPU. Set mixed_precision=no or bf16.")
    if mixed_precision in ("bf16", "fp8") and _lacks_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"mixed_precision={mixed_precision} needs bfloat16, which this GPU ({name}) lacks. Set "
            "mixed_precision=fp16."
        )


def inference_dtype(device: torch.device) -> torch.dtype:
    """The dtype of frozen models: float32 on the CPU; bfloat16 on a GPU, or float16 if it lacks bfloat16."""
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if _lacks_bfloat16(device) else torch.bfloat16


def _lacks_bfloat16(device: torch.device) -> bool:
    """NVIDIA GPUs before Ampere (8.0) lack it; PyTorch emulates it there, slower than float32."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 8
