"""The `ip_adapter` part of a file -> layer dims, cross_attention_dim and LoRA rank, from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]

_KEY_VALUE = re.compile(r"^([0-9]{1,6})\.to_([kv])_ip\.weight$")
_LORA = re.compile(r"^([0-9]{1,6})\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def infer_layers(shapes: Shapes, origin: str) -> tuple[tuple[int, ...], int, int | None]:
    """Layer dims in id order, the cross_attention_dim and the LoRA rank (None without a LoRA)."""
    sides: dict[str, dict[int, tuple[int, ...]]] = {"k": {}, "v": {}}
    lora: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 and (_KEY_VALUE.match(name) or _LORA.match(name)):
            raise AdapterError(
                f"{origin}: the tensor {name} is {list(shape)}, expected a matrix. Download or export it again."
            )
        if match := _KEY_VALUE.match(name):
            sides[match.group(2)][int(match.group(1))] = shape
        elif _LORA.match(name):
            lora[name] = shape
        else:
            raise AdapterError(
                f"{origin}: unexpected tensor ip_adapter.{name} {list(shape)}; expected '<id>.to_k_ip.weight', "
                "'<id>.to_v_ip.weight' or '<id>.to_q_lora...'. This adapter is not for SD1.5, SD2 or SDXL."
            )
    keys, values = sides["k"], sides["v"]
    _check_ids(keys, values, origin)
    cross_attention_dim = next(iter(keys.values()))[-1]
    for id, shape in keys.items():
        if values[id] != shape or shape[1] != cross_attention_dim:
            raise AdapterError(
                f"{origin}: layer {id} has to_k_ip {list(shape)} and to_v_ip {list(values[id])}; expected two of "
                f"[width, {cross_attention_dim}]. The file mixes different adapters; download or export it again."
            )
    dims = tuple(keys[id][0] for id in sorted(keys))
    return dims, cross_attention_dim, _infer_lora(lora, dims, cross_attention_dim, origin)


def _check_ids(keys: Mapping[int, object], values: Mapping[int, object], origin: str) -> None:
    for one, other, has, lacks in (
        (keys, values, "to_k_ip", "to_v_ip"),
        (values, keys, "to_v_ip", "to_k_ip"),
    ):
        unpaired = sorted(set(one) - set(other))
        if unpaired:
            raise AdapterError(f"{origin}: layer {unpaired[0]} has {has} but no {lacks}. Download or export it again.")
    if not keys:
        raise AdapterError(f"{origin}: has 0 image keys (to_k_ip). Download or export it again.")
    expected = range(1, 2 * len(keys), 2)
    if sorted(keys) == list(expected):
        return
    if any(id % 2 == 0 for id in keys):
        raise AdapterError(
            f"{origin}: the layer ids are {sorted(keys)[:4]}..., expected odd ids 1, 3, 5, ... Even ids are used by "
            "adapters for FLUX and SD3, which are not supported."
        )
    missing = next(id for id in range(1, max(keys) + 1, 2) if id not in keys)
    raise AdapterError(
        f"{origin}: layer {missing} is missing ({len(keys)} layers, ids up to {max(keys)}: expected "
        f"{(max(keys) + 1) // 2}). Download or export it again."
    )


def _infer_lora(lora: Shapes, dims: tuple[int, ...], cross_attention_dim: int, origin: str) -> int | None:
    """The rank of the LoRA, after checking that every attention layer has all eight tensors of the right
    shape.
    """
    if not lora:
        return None
    rank = next(iter(lora.values()))[0 if "down" in next(iter(lora)) else -1]
    for id in range(2 * len(dims)):
        dim = dims[id // 2]
        for part in ("q", "k", "v", "out"):
            source = cross_attention_dim if id % 2 and part in "kv" else dim
            for side, shape in (("down", (rank, source)), ("up", (dim, rank))):
                name = f"{id}.to_{part}_lora.{side}.weight"
                if lora.get(name) != shape:
                    raise AdapterError(
                        f"{origin}: the LoRA tensor {name} is {lora.get(name, 'missing')}, expected {shape}. Download "
                        "or export it again."
                    )
    return rank
