"""The names of weight files in a model's folder, and which of them are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-(?P<shards>\d+))?(\.fp16)?\.(safetensors|bin)"
)

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


class WeightNames(NamedTuple):
    """The weight files of a part that `from_pretrained` reads, and the variant to ask it for."""

    names: list[str]
    variant: str | None


def choose_weights(names: Iterable[str]) -> WeightNames | None:
    """Safetensors before pickles, full precision before fp16. None when there are none."""
    known = sorted(name for name in names if WEIGHTS.fullmatch(name))
    for fp16 in (False, True):
        for suffix in (".safetensors", ".bin"):
            found = [name for name in known if name.endswith(suffix) and (".fp16" in name) == fp16]
            if found:
                return WeightNames(found, "fp16" if fp16 else None)
    return None


def are_complete(names: Iterable[str]) -> bool:
    """Whether a folder with these files has weights, and every file of them when they are split."""
    chosen = choose_weights(names)
    if chosen is None:
        return False
    match = WEIGHTS.fullmatch(chosen.names[0])
    return match is None or match["shards"] is None or len(chosen.names) == int(match["shards"])
