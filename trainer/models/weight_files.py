"""Weight files from the outside: what a header says, and a fingerprint from a few values of every tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import BaseModelError

SAMPLES = 16  # values of a tensor, evenly spaced: a merged LoRA changes them all
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file. `offset` is in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]

    def has(self, *prefixes: str) -> bool:
        """Whether any tensor's name starts with one of these."""
        return any(name.startswith(prefixes) for name in self.tensors)


def read_header(file: Path) -> Header:
    """The header of a .safetensors file; its tensors stay on disk.

    Raises BaseModelError when it is no such file, or shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            entries: dict[str, Any] = json.loads(stream.read(length))
        metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
        tensors = {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{file}: not a safetensors file ({error}). Download it again.") from error
    if (size := file.stat().st_size) < end:
        raise BaseModelError(f"{file}: truncated: it has {size} bytes, its header says {end}. Download it again.")
    return Header(metadata, tensors)


def weights_fingerprint(files: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> str:
    """A digest of the floating-point tensors whose names start with one of `prefixes`: shapes and `SAMPLES` values
    of each, read from the files alone.

    Equal for a model in float32 and in float16, because values are rounded to both float16 and bfloat16. Names do
    not count: the layouts of one model, and the versions of the libraries that write it, differ in nothing else.
    """
    digests = sorted(
        hashlib.sha256(repr(_core(shape)).encode() + _canonical(values)).digest()
        for file in files
        for shape, values in (_sampled(file, prefixes) if file.suffix == ".safetensors" else _unpickled(file, prefixes))
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _sampled(file: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    header = read_header(file)
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # else the system reads ahead, in effect the whole file
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for name, entry in header.tensors.items():
            if entry.dtype in _FLOATS and name.startswith(prefixes):
                yield entry.shape, _read_values(stream, entry)


def _read_values(stream: BinaryIO, entry: TensorEntry) -> Tensor:
    dtype = _FLOATS[entry.dtype]
    raw = bytearray()
    for position in _positions(math.prod(entry.shape)):
        stream.seek(entry.offset + position * dtype.itemsize)
        raw += stream.read(dtype.itemsize)
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0)


def _unpickled(file: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name.startswith(prefixes):
            yield tuple(tensor.shape), tensor.flatten()[_positions(tensor.numel())]


def _positions(count: int) -> list[int]:
    if count <= SAMPLES:
        return list(range(count))
    return [i * (count - 1) // (SAMPLES - 1) for i in range(SAMPLES)]


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing ones: a 1 x 1 convolution in one layout is a matrix in another."""
    kept = list(shape)
    while kept and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _canonical(values: Tensor) -> bytes:
    return values.to(torch.float16).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
