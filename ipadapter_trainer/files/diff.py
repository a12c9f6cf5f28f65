"""`ipadapter diff`: what two adapter files have in common and where they differ, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipadapter_core import AdapterCheckpoint, AdapterSpec, infer_spec

from .opening import open_checkpoint

_DESCRIPTIVE = ("encoder_id",)  # free text
_LARGEST = 5  # keys and values that the text lists


@dataclass(frozen=True)
class TensorDifference:
    """Between two tensors of the same shape. `relative` is `max_abs` as a share of the larger one's largest value."""

    max_abs: float
    relative: float
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class AdapterDifference:
    """The comparison of two adapters. Pairs are (first, second), with None where one lacks the entry."""

    files: tuple[str, str]
    spec: Mapping[str, tuple[object, object]]
    metadata: Mapping[str, tuple[str | None, str | None]]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: Mapping[str, TensorDifference]

    def equal(self, tolerance: float = 0.0) -> bool:
        """Whether they make the same images: specs that do not contradict each other, the same keys and shapes, and no
        tensor that differs by more than `tolerance` of its largest value. 0 asks for the same numbers in the same
        dtype. Metadata about the origin does not count.
        """
        contradictions = [name for name, pair in self.spec.items() if name not in _DESCRIPTIVE and None not in pair]
        if contradictions or self.only_in_first or self.only_in_second or self.shapes:
            return False
        if tolerance == 0 and any(one != other for one, other in (t.dtypes for t in self.tensors.values())):
            return False
        return all(t.relative <= tolerance for t in self.tensors.values())

    def parts(self) -> dict[str, dict[str, float]]:
        """By part (image projector, keys, values, LoRA): its tensors, how many changed, the largest differences."""
        groups: dict[str, list[TensorDifference]] = {}
        for key, tensor in self.tensors.items():
            groups.setdefault(_part(key), []).append(tensor)
        return {
            part: {
                "tensors": len(group),
                "changed": sum(t.max_abs > 0 for t in group),
                "max_abs": max(t.max_abs for t in group),
                "relative": max(t.relative for t in group),
            }
            for part, group in groups.items()
        }

    def as_json(self, tolerance: float = 0.0) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        parts = [{"part": part, **numbers} for part, numbers in self.parts().items()]
        return {**asdict(self), "equal": self.equal(tolerance), "tolerance": tolerance, "parts": parts}

    def as_text(self, tolerance: float = 0.0) -> str:
        """Lines for the terminal; equal entries are left out."""
        lines = [f"first   {self.files[0]}", f"second  {self.files[1]}"]
        for name, (first, second) in (*self.spec.items(), *self.metadata.items()):
            lines.append(f"{name}: {first} / {second}")
        for which, keys in (("first", self.only_in_first), ("second", self.only_in_second)):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                lines.append(f"only in the {which}: {', '.join(keys[:3])}{more}")
        if self.shapes:
            key, (first, second) = next(iter(self.shapes.items()))
            lines.append(f"other shapes: {len(self.shapes)} tensors, such as {key}: {list(first)} / {list(second)}")
        dtypes = sorted({t.dtypes for t in self.tensors.values() if t.dtypes[0] != t.dtypes[1]})
        lines += [f"dtype: {first} / {second}" for first, second in dtypes]
        for part, numbers in self.parts().items():
            largest = f"largest difference {numbers['max_abs']:.3g}, relative {numbers['relative']:.3g}"
            change = largest if numbers["changed"] else "equal"
            lines.append(f"{part}: {numbers['changed']} of {numbers['tensors']} tensors differ; {change}")
        changed = [(k, t) for k, t in self.tensors.items() if _part(k) in ("keys", "values") and t.max_abs > 0]
        for key, t in sorted(changed, key=lambda item: -item[1].relative)[:_LARGEST]:
            lines.append(f"  {key}: {t.max_abs:.3g}, relative {t.relative:.3g}")
        equal = f"equal within {tolerance:g}" if tolerance else "equal"
        return "\n".join([*lines, equal if self.equal(tolerance) else "different"])


def diff(first: Path, second: Path) -> AdapterDifference:
    """Compare two adapters (files or folders, see `opening.adapter_files`), one tensor at a time, in float64.

    Raises AdapterError or ExportError for what cannot be read.
    """
    one, other = open_checkpoint(first), open_checkpoint(second)
    a, b = _shapes(one), _shapes(other)
    specs = [{field.name: getattr(infer_spec(c), field.name) for field in fields(AdapterSpec)} for c in (one, other)]
    entries = sorted((one.metadata.keys() | other.metadata.keys()) - {"format"})
    return AdapterDifference(
        files=(str(first), str(second)),
        spec={name: (specs[0][name], specs[1][name]) for name in specs[0] if specs[0][name] != specs[1][name]},
        metadata={
            key: (one.metadata.get(key), other.metadata.get(key))
            for key in entries
            if one.metadata.get(key) != other.metadata.get(key)
        },
        only_in_first=tuple(key for key in a if key not in b),
        only_in_second=tuple(key for key in b if key not in a),
        shapes={key: (a[key], b[key]) for key in a if key in b and a[key] != b[key]},
        tensors={key: _difference(_tensor(one, key), _tensor(other, key)) for key in a if a[key] == b.get(key)},
    )


def _shapes(checkpoint: AdapterCheckpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by flat key, the projector first, then the layers in id order; files have them in any order."""
    layers = sorted(checkpoint.ip_adapter.shapes.items(), key=lambda item: int(item[0].split(".")[0]))
    return {
        **{f"image_proj.{key}": shape for key, shape in checkpoint.image_proj.shapes.items()},
        **{f"ip_adapter.{key}": shape for key, shape in layers},
    }


def _tensor(checkpoint: AdapterCheckpoint, key: str) -> Tensor:
    part, _, name = key.partition(".")
    return (checkpoint.image_proj if part == "image_proj" else checkpoint.ip_adapter)[name]


def _part(key: str) -> str:
    if key.startswith("image_proj."):
        return "image projector"
    if "_lora." in key:
        return "LoRA"
    return "keys" if "to_k_ip" in key else "values"


def _difference(a: Tensor, b: Tensor) -> TensorDifference:
    dtypes = (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
    if a.numel() == 0 or (a.dtype == b.dtype and torch.equal(a, b)):
        return TensorDifference(0.0, 0.0, dtypes)
    one, other = a.double(), b.double()
    max_abs = (one - other).abs().max().item()
    size = max(one.abs().max().item(), other.abs().max().item())
    return TensorDifference(max_abs, max_abs / size if size else 0.0, dtypes)
