"""The processes that a launcher started, and the device that they compute on."""

from __future__ import annotations

import os

import torch
from accelerate.utils import parse_flag_from_env

from ..errors import ConfigError


def launched_on_cpu() -> bool:
    """Whether Accelerate has to be told that the processes work on the CPU: several of them without a GPU, which would
    otherwise not know of each other, or `ACCELERATE_USE_CPU`, which its launcher sets and PartialState does not read.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available())


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Raises ConfigError for a precision that the device cannot compute in, naming one that it can."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("mixed_precision=fp16 needs a GPU, but this runs on the CPU. Set mixed_precision=no or bf16.")
    # From Ampere (8.0) on; PyTorch emulates bfloat16 on older NVIDIA GPUs, slower than float32.
    too_old = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 8
    if mixed_precision in ("bf16", "fp8") and too_old:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"mixed_precision={mixed_precision} needs bfloat16, which this GPU ({name}) lacks. Set "
            "mixed_precision=fp16."
        )
