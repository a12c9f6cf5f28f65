"""The processes that a launcher started."""

from __future__ import annotations

import os

import torch
from accelerate.utils import parse_flag_from_env


def launched_on_cpu() -> bool:
    """Whether Accelerate has to be told that the processes work on the CPU: several of them without a GPU, which would
    otherwise not know of each other, or `ACCELERATE_USE_CPU`, which its launcher sets and PartialState does not read.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.cuda.is_available())
