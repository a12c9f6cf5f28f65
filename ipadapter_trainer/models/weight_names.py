"""The files in a model's folder: which weights are read, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-(?P<shards>\d+))?(\.fp16)?\.(safetensors|bin)"
)
VOCABULARY = ("merges.txt", "vocab.json")  # of a tokenizer
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


def missing_files(folder: Path, files: Iterable[str]) -> list[str]:
    """Those of a model's `files` that a folder lacks. As good as a weight file are others in its place, such as fp16
    ones, with all their shards; as the files of a vocabulary, a tokenizer.json.
    """
    return [file for file in files if not _is_there(folder / file)]


def _is_there(file: Path) -> bool:
    if file.is_file():
        return True
    names = {path.name for path in file.parent.glob("*")}
    if file.name in VOCABULARY:
        return "tokenizer.json" in names
    chosen = choose_weights(names) if WEIGHTS.fullmatch(file.name) else []
    match = WEIGHTS.fullmatch(chosen[0]) if chosen else None
    return match is not None and (match["shards"] is None or len(chosen) == int(match["shards"]))
