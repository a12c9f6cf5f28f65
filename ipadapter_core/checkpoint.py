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
from .tensors import TensorFile, TensorMap, file_from_tensors, open_tensors

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_EXPECTED = "an IP-Adapter .safetensors or .bin file"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterCheckpoint:
    """An opened adapter file. Tensors stay on disk until they are read from the mappings.

    Keys are the published names: `image_proj["proj.weight"]`, `ip_adapter["1.to_k_ip.weight"]`,
    `ip_adapter["0.to_q_lora.down.weight"]`. `layout` is that of the file, see `plan_keys`.
    """

    path: str
    metadata: Mapping[str, str]
    layout: str
    image_proj: TensorMap
    ip_adapter: TensorMap


def read_checkpoint(path: str | os.PathLike[str]) -> AdapterCheckpoint:
    """Open an IP-Adapter file (.safetensors or .bin, recognised by content) without reading its weights.

    Raises AdapterError when the file is missing, damaged, in another format or no IP-Adapter, or has weights that are
    empty or not floating point. Weights are checked when they are read: for NaN, infinity and matrices of zeros.
    Pickles are opened with `weights_only`, so their code does not run.
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
    """`read_checkpoint` for tensors in memory with flat keys of any layout (`image_proj.*`, `ip_adapter.*`, ...)."""
    return _checkpoint(path, file_from_tensors(state, metadata))


def _checkpoint(origin: str, file: TensorFile) -> AdapterCheckpoint:
    plan = plan_keys(file.infos, origin)
    _check_infos(origin, file, plan)
    return AdapterCheckpoint(
        path=origin,
        metadata=file.metadata,
        layout=plan.layout,
        image_proj=TensorMap(file, plan.image_proj, origin),
        ip_adapter=TensorMap(file, plan.ip_adapter, origin),
    )


def _open(path: Path) -> TensorFile:
    if not path.exists():
        raise AdapterError(f"{path}: no such file. Check the path.")
    if not path.is_file():
        raise AdapterError(f"{path}: a folder, not a file. Choose the .safetensors or .bin file inside it.")
    return open_tensors(path, _EXPECTED)


def _check_infos(origin: str, file: TensorFile, plan: KeyPlan) -> None:
    for name, key in (plan.image_proj | plan.ip_adapter).items():
        shape, dtype, _ = file.infos[key]
        if dtype not in WEIGHT_DTYPES:
            raise AdapterError(
                f"{origin}: the tensor {name} is {dtype}; expected one of {', '.join(map(str, WEIGHT_DTYPES))}. "
                "Convert the file to float16 or float32."
            )
        if 0 in shape:
            raise AdapterError(f"{origin}: the tensor {name} is empty, {list(shape)}. Download or export it again.")
