"""Adapter files -> named tensors, whatever the container and the key layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import AdapterError
from .layouts import KeyPlan, plan_keys
from .tensors import TensorFile, TensorMap, file_from_tensors, read_pickle, read_safetensors

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
# First bytes of what people pick by mistake.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a WebP image or another RIFF file"),
    (b"GGUF", "a GGUF model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page"),
)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterCheckpoint:
    """An opened adapter file. Tensors stay on disk until they are read from the mappings.

    Keys are the published names: `image_proj["proj.weight"]`, `ip_adapter["1.to_k_ip.weight"]`,
    `ip_adapter["0.to_q_lora.down.weight"]`. `layout` says which layout the file had.
    """

    path: str
    metadata: Mapping[str, str]
    layout: str
    image_proj: TensorMap
    ip_adapter: TensorMap


def read_checkpoint(path: str | os.PathLike[str]) -> AdapterCheckpoint:
    """Open an IP-Adapter file (.safetensors or .bin, recognised by content) without reading its weights.

    Raises AdapterError, which names the file and says what it looks like, when the file is missing,
    damaged, in another format, holds something else than an IP-Adapter, or has weights that are not
    floating point. Weights are checked for NaN and infinity when they are read. Pickles are opened with
    `weights_only`, so no code of theirs runs.
    """
    where = Path(path)
    try:
        file = _open(where)
    except OSError as error:
        raise AdapterError(
            f"{where}: cannot be read ({error.strerror}). Check its permissions and the disk."
        ) from error
    return _checkpoint(str(where), file)


def checkpoint_from_state(
    state: Mapping[str, Tensor], *, path: str = "<memory>", metadata: Mapping[str, str] | None = None
) -> AdapterCheckpoint:
    """The same for tensors in memory with flat keys of any layout (`image_proj.*`, `ip_adapter.*`, ...)."""
    return _checkpoint(path, file_from_tensors(state, metadata))


def _checkpoint(origin: str, file: TensorFile) -> AdapterCheckpoint:
    plan = plan_keys(file.infos, origin)
    _check_dtypes(origin, file, plan)
    return AdapterCheckpoint(
        path=origin,
        metadata=file.metadata,
        layout=plan.layout,
        image_proj=TensorMap(file, plan.image_proj, origin),
        ip_adapter=TensorMap(file, plan.ip_adapter, origin),
    )


def _open(path: Path) -> TensorFile:
    if not path.exists():
        raise AdapterError(
            f"{path}: no such file. Check the path, or put the adapter into the models/ipadapter folder."
        )
    if not path.is_file():
        raise AdapterError(f"{path}: a folder, not a file. Choose the .safetensors or .bin file inside it.")
    with path.open("rb") as stream:
        start = stream.read(64)
    if len(start) == 0:
        raise AdapterError(f"{path}: empty (0 bytes). Download it again.")
    # Before the magic numbers: a header's length comes first, and its low byte may be any of theirs.
    if len(start) > 8 and start[8:9] == b"{":
        return read_safetensors(path)
    for magic, description in _MAGIC:
        if start.lstrip().startswith(magic):
            raise AdapterError(f"{path}: looks like {description}. Choose an IP-Adapter .safetensors or .bin file.")
    if start.startswith((_ZIP, _PICKLE)):
        return read_pickle(path, is_zip=start.startswith(_ZIP))
    raise AdapterError(
        f"{path}: neither safetensors nor a PyTorch file (it starts with {start[:8]!r}). Choose an IP-Adapter "
        ".safetensors or .bin file."
    )


def _check_dtypes(origin: str, file: TensorFile, plan: KeyPlan) -> None:
    for name, key in (plan.image_proj | plan.ip_adapter).items():
        dtype = file.infos[key].dtype
        if dtype not in WEIGHT_DTYPES:
            raise AdapterError(
                f"{origin}: the tensor {name} is {dtype}; expected one of {', '.join(map(str, WEIGHT_DTYPES))}. "
                "Convert the file to float16 or float32."
            )
