"""Tensors of a file by name, read on access."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from .errors import AdapterError
from .file_types import DOWNLOAD_AGAIN, PICKLE, SAFETENSORS, ZIP, file_type, unexpected_type

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """One tensor in a file's header. `offset` is where its bytes start in a safetensors file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0


class TensorFile(NamedTuple):
    """The names, shapes and dtypes in a file, and how to read one tensor of it."""

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]


class TensorMap(Mapping[str, Tensor]):
    """Published key -> tensor. Shapes and dtypes are known at once; a tensor is read, and checked, on access.

    Raises AdapterError on access as `check_values` does, naming the file and the key.
    """

    def __init__(self, file: TensorFile, keys: Mapping[str, str], origin: str) -> None:
        """`keys` maps each published key to its key in `file`; `origin` names the file in errors."""
        self._file = file
        self._keys = dict(keys)
        self._origin = origin
        self.shapes: Mapping[str, tuple[int, ...]] = {k: file.infos[s].shape for k, s in keys.items()}
        self.dtypes: Mapping[str, torch.dtype] = {k: file.infos[s].dtype for k, s in keys.items()}

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._file.read(self._keys[key])
        check_values(key, tensor, self._origin)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # Mapping's own version would read the tensor

    def __repr__(self) -> str:
        return f"TensorMap({len(self)} tensors of {self._origin})"


def check_values(name: str, tensor: Tensor, origin: str) -> None:
    """Refuse a weight that `value_fault` finds fault with. `origin` is the file, for the message.

    Raises AdapterError.
    """
    if fault := value_fault(name, tensor):
        what, cause = fault
        raise AdapterError(f"{origin}: {what}. {cause}")


def value_fault(name: str, tensor: Tensor) -> tuple[str, str] | None:
    """For a weight that holds NaN or infinity and for a matrix of zeros, a clause that says so, and what to do when a
    file holds it; else None.

    A broken download leaves zeros, and the layer would silently do nothing. Vectors (biases) and a LoRA, whose `up`
    starts at zero, may be zero.
    """
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
        return None
    if tensor.element_size() == 1:  # 8-bit floats have no minimum of their own
        tensor = tensor.half()
    # NaN propagates to both ends.
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        return (
            f"the tensor {name} holds NaN or infinity",
            "The file is damaged or its training diverged. Download it again, or export an earlier checkpoint.",
        )
    if low == high == 0 and tensor.ndim > 1 and "lora" not in name:
        return (
            f"all {tensor.numel():,} values of the tensor {name} are zero",
            "The download broke off. Download it again.",
        )
    return None


def check_weights(weights: Mapping[str, Tensor], origin: str) -> None:
    """`check_values` for all weights of a model, such as its `state_dict()`."""
    for name, tensor in weights.items():
        check_values(name, tensor, origin)


def file_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> TensorFile:
    """A TensorFile over tensors that are already in memory (meta tensors too)."""
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    return TensorFile(infos, tensors.__getitem__, metadata or {})


def open_tensors(path: Path, expected: str, advice: str = DOWNLOAD_AGAIN) -> TensorFile:
    """Open a .safetensors or PyTorch file, recognised by its content, without reading its tensors.

    `expected` ("the weights of a UNet") and `advice`, what to do with a broken file, are for messages.

    Raises AdapterError for another kind of file, which it names, for a damaged one, and for a path that is not UTF-8;
    OSError when it cannot be read.
    """
    found = file_type(path)
    if str(path).encode("utf-8", "ignore").decode() != str(path):
        raise AdapterError(f"{str(path)!r} is not UTF-8, and safetensors and PyTorch open no other path. Rename it.")
    if found == SAFETENSORS:
        return read_safetensors(path, advice)
    if found in (ZIP, PICKLE):
        return read_pickle(path, is_zip=found == ZIP, advice=advice)
    raise unexpected_type(path, expected, advice)


def read_safetensors(path: Path, advice: str = DOWNLOAD_AGAIN) -> TensorFile:
    """Open a safetensors file: its header is read, its tensors are memory-mapped.

    Raises AdapterError when the header is not valid or the file is shorter than the header says.
    """
    infos, metadata = _read_header(path, advice)
    try:
        handle: Any = safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: damaged safetensors file ({error}). {advice}") from error
    return TensorFile(infos, cast("Callable[[str], Tensor]", handle.get_tensor), metadata)


def _read_header(path: Path, advice: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path}: not a safetensors file (its header would be {length} bytes, the limit is "
                f"{MAX_HEADER_BYTES}). {advice}"
            )
        if size < 8 + length:
            raise _truncated(path, size, 8 + length, advice)
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata: dict[str, str] = dict(header.pop("__metadata__", None) or {})
        unknown = {str(entry["dtype"]) for entry in header.values()} - _DTYPES.keys()
        infos = {
            key: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0])
            for key, entry in header.items()
            if entry["dtype"] not in unknown
        }
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path}: the safetensors header is damaged ({error!r}). {advice}") from error
    if unknown:
        raise AdapterError(
            f"{path}: holds tensors of the type {', '.join(sorted(unknown))}, which is not read. Convert it to F16 or "
            "another common type."
        )
    if size < 8 + length + end:
        raise _truncated(path, size, 8 + length + end, advice)
    return infos, metadata


def _truncated(path: Path, size: int, expected: int, advice: str) -> AdapterError:
    return AdapterError(f"{path}: truncated: it has {size} bytes, its header says {expected}. {advice}")


def read_pickle(path: Path, *, is_zip: bool, advice: str = DOWNLOAD_AGAIN) -> TensorFile:
    """Open a PyTorch .bin without running code from it; nested dicts become dotted keys.

    Raises AdapterError when the file holds anything but tensors in dicts, or is damaged.
    """
    return file_from_tensors(_flatten(_unpickle(path, is_zip=is_zip, advice=advice), path))


def read_tensor(path: Path, expected: str, advice: str = DOWNLOAD_AGAIN) -> Tensor:
    """The tensor in a PyTorch file that holds nothing else. `expected` and `advice` are as in `open_tensors`.

    Raises AdapterError when the file is something else, or damaged; OSError when it cannot be read at all.
    """
    found = file_type(path)
    if found not in (ZIP, PICKLE):
        raise unexpected_type(path, expected, advice)
    content = _unpickle(path, is_zip=found == ZIP, advice=advice)
    if not isinstance(content, Tensor):
        raise AdapterError(f"{path}: holds one {type(content).__name__}; expected {expected}. Choose another file.")
    return content.detach().clone()  # off the file


def _unpickle(path: Path, *, is_zip: bool, advice: str = DOWNLOAD_AGAIN) -> object:
    """Only `torch.load(weights_only=True)` touches a pickle."""
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"Python objects ({found.group(1)})" if found else "something else than tensors"
        raise AdapterError(
            f"{path}: the pickle holds {holds}, which could run code; nothing was executed. Expected a dict of "
            "tensors. Convert it to safetensors where you trust it, or get another copy."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise AdapterError(
            f"{path}: truncated or not a PyTorch file ({path.stat().st_size} bytes; {reason}). {advice}"
        ) from error


def _flatten(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: holds one {type(content).__name__}; expected a dict of tensors.")
    tensors: dict[str, Tensor] = {}
    for key, value in cast("dict[Any, Any]", content).items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, dict):
            tensors.update({f"{key}.{inner}": tensor for inner, tensor in _flatten(value, path).items()})
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that appears whole or not at all. Raises OSError or SafetensorError when the disk refuses."""
    # In the folder of the target, so that the replacement is atomic (one file system).
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that their owner alone can read
        save_file(dict(tensors), str(temporary), metadata=dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
