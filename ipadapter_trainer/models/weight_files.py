"""Weight files: their headers, and a fingerprint from a few values of every tensor."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ipadapter_core import AdapterError
from ipadapter_core.file_types import PICKLE, download_again, file_type
from ipadapter_core.tensors import TensorFile, TensorInfo, open_tensors

from ..errors import BaseModelError

SAMPLES = 16  # values of a tensor, evenly spaced: a merged LoRA changes them all
PAGE = "its page"  # where to download a model whose origin is unknown


def open_weights(file: Path, expected: str = "model weights", source: str = PAGE) -> TensorFile:
    """Open a .safetensors or .bin file; its tensors stay on disk. `expected` ("UNet weights") and `source`, where to
    download it from, are for messages.

    Raises BaseModelError for a damaged file and for another one, saying what it is.
    """
    try:
        return open_tensors(file, expected, download_again(source))
    except AdapterError as error:
        raise BaseModelError(str(error)) from error


def check_header(file: Path, expected: str, source: str = PAGE) -> None:
    """Check a file as `open_weights` does, except pickles of the old format, which would be read as a whole."""
    if file_type(file) != PICKLE:
        open_weights(file, expected, source)


def weights_fingerprint(files: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> str:
    """A digest of the floating-point tensors whose names start with one of `prefixes`: the shape and `SAMPLES` values
    of each.

    It is the same for float32, float16 and bfloat16 files, because values are rounded to both of the latter, and for
    all layouts, because names are left out.
    """
    digests = sorted(
        hashlib.sha256(repr(_trimmed(shape)).encode() + _rounded(values)).digest()
        for file in files
        for shape, values in _sampled(file, prefixes)
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _sampled(file: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    opened = open_weights(file)
    floats = {n: i for n, i in opened.infos.items() if i.dtype.is_floating_point and n.startswith(prefixes)}
    if not all(info.offset for info in floats.values()):  # a pickle
        for name, info in floats.items():
            yield info.shape, opened.read(name).flatten()[_positions(math.prod(info.shape))]
        return
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # without it the system reads ahead, in effect the whole file
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for info in floats.values():
            yield info.shape, _read_values(stream, info)


def _read_values(stream: BinaryIO, info: TensorInfo) -> Tensor:
    raw = bytearray()
    for position in _positions(math.prod(info.shape)):
        stream.seek(info.offset + position * info.dtype.itemsize)
        raw += stream.read(info.dtype.itemsize)
    return torch.frombuffer(raw, dtype=info.dtype) if raw else torch.empty(0)


def _positions(count: int) -> list[int]:
    if count <= SAMPLES:
        return list(range(count))
    return [i * (count - 1) // (SAMPLES - 1) for i in range(SAMPLES)]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing ones: a 1 x 1 convolution in one layout is a matrix in another."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _rounded(values: Tensor) -> bytes:
    return values.to(torch.float16).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
