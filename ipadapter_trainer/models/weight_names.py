"""The names of weight files in a model's folder, and which of them are read."""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-(?P<shards>\d+))?(\.fp16)?\.(safetensors|bin)"
)
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


def choose_weights(names: Iterable[str]) -> list[str]:
    """The weight files to read: safetensors before pickles, full precision before fp16; [] when there are none."""
    known = sorted(name for name in names if WEIGHTS.fullmatch(name))
    for fp16 in (False, True):
        for suffix in (".safetensors", ".bin"):
            found = [name for name in known if name.endswith(suffix) and (".fp16" in name) == fp16]
            if found:
                return found
    return []


def are_complete(names: Iterable[str]) -> bool:
    """Whether a folder with these files has weights, and all shards of them."""
    chosen = choose_weights(names)
    match = WEIGHTS.fullmatch(chosen[0]) if chosen else None
    return match is not None and (match["shards"] is None or len(chosen) == int(match["shards"]))
