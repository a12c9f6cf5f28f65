"""`ipadapter diff`: what two adapter files have in common and where they differ, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ipadapter_core import AdapterCheckpoint, AdapterSpec, TensorMap, infer_spec

from .opening import open_checkpoint

_LORA = re.compile(r"\.to_(q|k|v|out)_lora\.")
_DESCRIPTIVE = ("encoder_id",)  # free text
LARGEST = 5


@dataclass(frozen=True)
class TensorDifference:
    """Between two tensors of the same shape. `relative` is `max_abs` as a share of the larger one's largest value."""

    key: str
    max_abs: float
    relative: float
    dtypes: tuple[str, str]

    @property
    def part(self) -> str:
        """The image projector, keys, values or LoRA."""
        if self.key.startswith("image_proj."):
            return "image projector"
        if _LORA.search(self.key):
            return "LoRA"
        return "keys" if "to_k_ip" in self.key else "values"


@dataclass(frozen=True)
class PartDifference:
    """The largest differences among the tensors of a part, and how many of them differ at all."""

    part: str
    tensors: int
    changed: int
    max_abs: float
    relative: float


@dataclass(frozen=True)
class AdapterDifference:
    """Two adapters. Pairs are (first, second); None stands for what one of them lacks."""

    files: tuple[str, str]
    spec: Mapping[str, tuple[object, object]]
    metadata: Mapping[str, tuple[str | None, str | None]]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: tuple[TensorDifference, ...]

    def equal(self, tolerance: float = 0.0) -> bool:
        """Whether they make the same images: the same spec where both say it, the same keys and shapes, and no
        tensor that differs by more than `tolerance` of its largest value. 0 asks for the same numbers in the same
        dtype. Metadata about the origin does not count.
        """
        contradictions = [name for name, pair in self.spec.items() if name not in _DESCRIPTIVE and None not in pair]
        if contradictions or self.only_in_first or self.only_in_second or self.shapes:
            return False
        if tolerance == 0 and any(one != other for one, other in (t.dtypes for t in self.tensors)):
            return False
        return all(t.relative <= tolerance for t in self.tensors)

    def parts(self) -> tuple[PartDifference, ...]:
        """A summary by part, in file order."""
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.part, []).append(tensor)
        return tuple(
            PartDifference(
                part,
                len(group),
                sum(t.max_abs > 0 for t in group),
                max(t.max_abs for t in group),
                max(t.relative for t in group),
            )
            for part, group in groups.items()
        )

    def largest_keys_values(self, count: int = LARGEST) -> tuple[TensorDifference, ...]:
        """The keys and values that differ most, relative to their size."""
        found = [t for t in self.tensors if t.part in ("keys", "values") and t.max_abs > 0]
        return tuple(sorted(found, key=lambda t: -t.relative)[:count])

    def as_json(self, tolerance: float = 0.0) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return {
            "files": list(self.files),
            "equal": self.equal(tolerance),
            "tolerance": tolerance,
            "spec": {name: list(pair) for name, pair in self.spec.items()},
            "metadata": {key: list(pair) for key, pair in self.metadata.items()},
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
            "shapes": {key: [list(shape) for shape in pair] for key, pair in self.shapes.items()},
            "parts": [{f.name: getattr(part, f.name) for f in fields(PartDifference)} for part in self.parts()],
            "tensors": {
                t.key: {"max_abs": t.max_abs, "relative": t.relative, "dtypes": list(t.dtypes)} for t in self.tensors
            },
        }

    def as_text(self, tolerance: float = 0.0) -> str:
        """Lines for people; nothing about what is equal."""
        lines = [f"first   {self.files[0]}", f"second  {self.files[1]}"]
        lines += [f"{name}: {first} / {second}" for name, (first, second) in self.spec.items()]
        lines += [f"{key}: {first} / {second}" for key, (first, second) in self.metadata.items()]
        for which, keys in (("first", self.only_in_first), ("second", self.only_in_second)):
            if keys:
                lines.append(f"only in the {which}: {_some(keys)}")
        if self.shapes:
            key, (first, second) = next(iter(self.shapes.items()))
            lines.append(f"other shapes: {len(self.shapes)} tensors, such as {key}: {list(first)} / {list(second)}")
        dtypes = sorted({t.dtypes for t in self.tensors if t.dtypes[0] != t.dtypes[1]})
        lines += [f"dtype: {first} / {second}" for first, second in dtypes]
        for part in self.parts():
            change = f"largest difference {part.max_abs:.3g}, relative {part.relative:.3g}" if part.changed else "equal"
            lines.append(f"{part.part}: {part.changed} of {part.tensors} tensors differ; {change}")
        for t in self.largest_keys_values():
            lines.append(f"  {t.key}: {t.max_abs:.3g}, relative {t.relative:.3g}")
        equal = f"equal within {tolerance:g}" if tolerance else "equal"
        return "\n".join([*lines, equal if self.equal(tolerance) else "different"])


def diff(first: Path, second: Path) -> AdapterDifference:
    """Compare two adapters wherever they are (see `opening.adapter_files`), one tensor at a time, in float64.

    Raises AdapterError or ExportError for what cannot be read.
    """
    one, other = open_checkpoint(first), open_checkpoint(second)
    a, b = _shapes(one), _shapes(other)
    common = [key for key in a if key in b]
    same = [key for key in common if a[key] == b[key]]
    return AdapterDifference(
        files=(str(first), str(second)),
        spec=_spec_differences(infer_spec(one), infer_spec(other)),
        metadata=_metadata_differences(one.metadata, other.metadata),
        only_in_first=tuple(key for key in a if key not in b),
        only_in_second=tuple(key for key in b if key not in a),
        shapes={key: (a[key], b[key]) for key in common if a[key] != b[key]},
        tensors=tuple(_tensor_difference(key, _tensor(one, key), _tensor(other, key)) for key in same),
    )


def _parts(checkpoint: AdapterCheckpoint) -> Iterator[tuple[str, TensorMap]]:
    yield "image_proj", checkpoint.image_proj
    yield "ip_adapter", checkpoint.ip_adapter


def _shapes(checkpoint: AdapterCheckpoint) -> dict[str, tuple[int, ...]]:
    """By flat key, the layers in id order: files keep their keys in any order."""
    flat = {f"{part}.{key}": shape for part, tensors in _parts(checkpoint) for key, shape in tensors.shapes.items()}
    return dict(sorted(flat.items(), key=lambda item: _layer_of(item[0])))


def _layer_of(key: str) -> int:
    """The layer's id; -1 for the projector, which comes first."""
    part, second = key.split(".")[:2]
    return int(second) if part == "ip_adapter" else -1


def _tensor(checkpoint: AdapterCheckpoint, key: str) -> Tensor:
    part, _, name = key.partition(".")
    return dict(_parts(checkpoint))[part][name]


def _tensor_difference(key: str, a: Tensor, b: Tensor) -> TensorDifference:
    dtypes = (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
    if a.numel() == 0 or (a.dtype == b.dtype and torch.equal(a, b)):
        return TensorDifference(key, 0.0, 0.0, dtypes)
    one, other = a.double(), b.double()
    max_abs = (one - other).abs().max().item()
    size = max(one.abs().max().item(), other.abs().max().item())
    return TensorDifference(key, max_abs, max_abs / size if size else 0.0, dtypes)


def _spec_differences(a: AdapterSpec, b: AdapterSpec) -> dict[str, tuple[object, object]]:
    pairs = {field.name: (getattr(a, field.name), getattr(b, field.name)) for field in fields(AdapterSpec)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _metadata_differences(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    keys = sorted((a.keys() | b.keys()) - {"format"})
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
