"""A written adapter file, read back as its users will read it, against the adapter that it was written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import (
    AdapterCheckpoint,
    AdapterError,
    AdapterSpec,
    IPAdapter,
    KeyValue,
    adapter_from_checkpoint,
    build_projector,
    export_state,
    infer_spec,
    read_checkpoint,
    with_shortcut,
)

from ..errors import VerificationError
from .published import published_differences, published_shapes

if TYPE_CHECKING:
    from .diffusers_loader import DiffusersAdapter

DIFFUSERS = f"diffusers {version('diffusers')}"
# Largest share of an output's largest value. Between two loaders of the same weights only the order of sums differs;
# rounding the weights costs 2^-11 of each in float16 and 2^-8 in bfloat16, and a few times that at the outputs.
LOADER_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
# Free text of the header, and what may come with the metadata.
_NOT_OF_THE_TENSORS = ("encoder_id", "negative")


@dataclass(frozen=True)
class Verification:
    """A file that passed. `loaders` read it and agree; `rounding` is the largest difference to the original weights'
    outputs and `disagreement` that between the loaders, both as shares of the output's largest value. `notes` are for
    people: what was not checked, and what hosts will or will not do.
    """

    file: Path
    tensors: int
    dtypes: tuple[str, ...]
    loaders: tuple[str, ...]
    rounding: float
    disagreement: float
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """Lines for people."""
        lines = [f"Checked: {self.tensors} tensors in {', '.join(self.dtypes)}, read back with {self.loaders[0]}"]
        if len(self.loaders) > 1:
            within = f"within {self.disagreement:.1e}" if self.disagreement else "exactly"
            lines[0] += f" and {self.loaders[1]}, which agree {within}"
        rounded = f"differ by {self.rounding:.1e} from" if self.rounding else "are equal to"
        lines[0] += f"; the outputs {rounded} the original weights'."
        return "\n".join(lines + [f"Note: {note}" for note in self.notes])


def verify_export(
    file: Path, reference: IPAdapter, metadata: Mapping[str, str] | None = None, *, with_diffusers: bool = True
) -> Verification:
    """Read a .safetensors or .bin file with ipadapter_core and (`with_diffusers`), where its loader can take it, with
    diffusers, and compare it with `reference`: keys and shapes with the published table, every tensor bitwise (after
    rounding to the file's dtype), the tokens and each layer's keys and values for fixed random features, and `metadata`
    with the header of a .safetensors file. Nothing is deleted.

    Raises VerificationError that names the key or layer and both numbers.
    """
    spec = _spec_in_use(reference)
    try:
        checkpoint = read_checkpoint(file)
        _check_keys(checkpoint, spec)
        notes = _check_spec(file, infer_spec(checkpoint), spec) + _check_metadata(checkpoint, metadata or {})
        dtypes = _check_tensors(checkpoint, export_state(reference))
        adapter = adapter_from_checkpoint(checkpoint, shortcut=spec.shortcut)
    except AdapterError as error:
        raise VerificationError(f"The written file does not load: {error}") from error
    names = tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    features = random_features(spec)
    rounding = _Comparison(
        file,
        ("the original weights", "the file's"),
        max(ROUNDING_TOLERANCE[dtype] for dtype in dtypes),
        f"{' and '.join(names)} is too coarse for these weights; write the file in float32.",
    ).compare(_Outputs(reference, spec), _Outputs(adapter, spec), features)
    loaders, disagreement = ["ipadapter_core"], 0.0
    if with_diffusers:
        found = verify_with_diffusers(file, adapter)
        if isinstance(found, str):
            notes.append(f"{DIFFUSERS} cannot load it ({found}), so only ipadapter_core was asked.")
        else:
            disagreement = found
            loaders.append(DIFFUSERS)
        if spec.shortcut and not isinstance(found, str):
            notes.append("diffusers does not read v2 from a file: set shortcut = True on its image projection layer.")
    notes += [f"{difference[0].upper()}{difference[1:]}." for difference in published_differences(spec)]
    count = len(checkpoint.image_proj) + len(checkpoint.ip_adapter)
    return Verification(file, count, names, tuple(loaders), rounding, disagreement, tuple(notes))


def random_features(spec: AdapterSpec, rows: int = 2, length: int = 9) -> tuple[Tensor, ...]:
    """Fixed features as `IPAdapter.encode` takes them: standard normal, face embeddings of length 1."""
    generator = torch.Generator().manual_seed(0)
    features: list[Tensor] = []
    if spec.face_dim is not None:
        features.append(F.normalize(torch.randn(rows, spec.face_dim, generator=generator), dim=-1))
    if spec.image_dim is not None:
        shape = (rows, spec.image_dim) if spec.kind == "base" else (rows, length, spec.image_dim)
        features.append(torch.randn(shape, generator=generator))
    return tuple(features)


class Outputs(Protocol):
    """An adapter as some loader made it, computed in float32 on the CPU."""

    def encode(self, *features: Tensor) -> Tensor: ...

    def keys_values(self, tokens: Tensor) -> Iterator[tuple[int, KeyValue]]: ...


class _Outputs:
    """Those of an IPAdapter, one layer at a time, without a float32 copy of its layers."""

    def __init__(self, adapter: IPAdapter, spec: AdapterSpec) -> None:
        # A file that does not say v1 or v2 is compared as v1; its keys are the same.
        self._adapter = adapter
        known = spec if spec.kind != "faceid-plus" else with_shortcut(spec, bool(spec.shortcut))
        with torch.device("meta"):
            self._projector = build_projector(known)
        weights = {key: _float(value) for key, value in adapter.projector.state_dict().items()}
        self._projector.load_state_dict(weights, assign=True)

    @torch.no_grad()
    def encode(self, *features: Tensor) -> Tensor:
        return self._projector(*features)

    @torch.no_grad()
    def keys_values(self, tokens: Tensor) -> Iterator[tuple[int, KeyValue]]:
        layers = self._adapter.layers
        for id, pair in zip(layers.layer_ids, layers.pairs(), strict=True):
            key, value = (F.linear(tokens, _float(part.get_parameter("weight"))) for part in pair)
            yield id, KeyValue(key, value)


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _spec_in_use(adapter: IPAdapter) -> AdapterSpec:
    """The spec, with the shortcut that the projector really uses."""
    shortcut = getattr(adapter.projector, "shortcut", None)
    return with_shortcut(adapter.spec, shortcut)


def _check_keys(checkpoint: AdapterCheckpoint, spec: AdapterSpec) -> None:
    origin, wanted = checkpoint.path, published_shapes(spec)
    found = {f"image_proj.{key}": shape for key, shape in checkpoint.image_proj.shapes.items()}
    found |= {f"ip_adapter.{key}": shape for key, shape in checkpoint.ip_adapter.shapes.items()}
    if checkpoint.layout != "flat":
        raise VerificationError(f"{origin}: its keys are in the {checkpoint.layout} layout, not the published one.")
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise VerificationError(
                f"{origin}: the tensor {key} is {list(found[key]) if key in found else 'missing'}; the published "
                f"format of a {spec.kind} adapter has {list(wanted[key]) if key in wanted else 'no such tensor'}."
            )


def _check_spec(file: Path, found: AdapterSpec, wanted: AdapterSpec) -> list[str]:
    """Raises VerificationError when the file says something else; returns what a .bin cannot say."""
    notes: list[str] = []
    for field in fields(AdapterSpec):
        said, meant = getattr(found, field.name), getattr(wanted, field.name)
        if said == meant or field.name in _NOT_OF_THE_TENSORS:
            continue
        told_apart_otherwise = field.name == "shortcut" or (field.name == "num_tokens" and wanted.kind == "full")
        if not (told_apart_otherwise and file.suffix == ".bin"):
            hint = " A .bin has no header that could say it; use .safetensors." if file.suffix == ".bin" else ""
            raise VerificationError(f"{file}: its {field.name} reads as {said!r}, it was {meant!r}.{hint}")
        notes.append(f"A .bin has no header, so this one does not say that {field.name} is {meant!r}.")
    return notes


def _check_metadata(checkpoint: AdapterCheckpoint, wanted: Mapping[str, str]) -> list[str]:
    if Path(checkpoint.path).suffix == ".bin":
        return [f"A .bin has no header: {len(wanted)} entries of metadata are left out."] if wanted else []
    for key, value in wanted.items():
        if checkpoint.metadata.get(key) != value:
            raise VerificationError(
                f"{checkpoint.path}: its metadata says {key}={checkpoint.metadata.get(key)!r}, it was {value!r}."
            )
    return []


def _check_tensors(checkpoint: AdapterCheckpoint, state: dict[str, Tensor]) -> set[torch.dtype]:
    """Compare every tensor with the original after rounding; returns the dtypes of the file."""
    dtypes: set[torch.dtype] = set()
    for key, original in state.items():
        part, _, name = key.partition(".")
        written = (checkpoint.image_proj if part == "image_proj" else checkpoint.ip_adapter)[name]
        dtypes.add(written.dtype)
        wanted = original.detach().to("cpu", written.dtype)
        if not torch.equal(written, wanted):
            difference = (written.double() - wanted.double()).abs().max().item()
            raise VerificationError(
                f"{checkpoint.path}: the tensor {key} differs by up to {difference:.3g} from what was written. The "
                "disk or the memory is damaged; write it again, to another disk."
            )
    return dtypes


def verify_with_diffusers(file: Path, adapter: IPAdapter) -> float | str:
    """The largest difference between the outputs of `adapter`, as ipadapter_core read it from the file, and of what
    diffusers makes of the file; or why diffusers' loader cannot take such an adapter.

    Raises VerificationError when it fails, the import of diffusers' loader included, or when the outputs differ.
    """
    spec = _spec_in_use(adapter)
    try:
        # Imported here: this module must work whatever becomes of that loader.
        from .diffusers_loader import load_with_diffusers, unsupported

        reason = unsupported(spec)
        if reason is not None:
            return reason
        theirs = load_with_diffusers(file, spec)
    except Exception as error:  # whatever its users would meet
        raise VerificationError(f"{file}: {DIFFUSERS} does not load it ({type(error).__name__}: {error}).") from error
    _check_lora(file, adapter, theirs)
    advice = "Its users would get other images; do not publish it, and report this with the output of `inspect`."
    comparison = _Comparison(file, ("ipadapter_core", DIFFUSERS), LOADER_TOLERANCE, advice)
    return comparison.compare(_Outputs(adapter, spec), theirs, random_features(spec))


def _check_lora(file: Path, ours: IPAdapter, theirs: DiffusersAdapter) -> None:
    for name, weight in ours.lora.state_dict().items() if ours.lora is not None else ():
        id, part, side, _ = name.split(".")
        loaded = theirs.lora(int(id), part, side)
        if loaded is None or not torch.equal(loaded, weight):
            raise VerificationError(f"{file}: {DIFFUSERS} reads another LoRA tensor than ip_adapter.{name}, or none.")


@dataclass(frozen=True)
class _Comparison:
    """Between the outputs of two loaders, by `names`; `tolerance` is a share of an output's largest value."""

    file: Path
    names: tuple[str, str]
    tolerance: float
    advice: str

    def compare(self, one: Outputs, other: Outputs, features: tuple[Tensor, ...]) -> float:
        """The largest difference; raises VerificationError beyond the tolerance."""
        tokens, other_tokens = one.encode(*features), other.encode(*features)
        worst = self._difference("the tokens", tokens, other_tokens)
        for (id, a), (other_id, b) in zip(one.keys_values(tokens), other.keys_values(other_tokens), strict=True):
            if id != other_id:
                raise VerificationError(f"{self.file}: layer {id} with {self.names[0]} is {other_id} with the other.")
            keys = self._difference(f"the keys of layer {id}", a.key, b.key)
            worst = max(worst, keys, self._difference(f"the values of layer {id}", a.value, b.value))
        return worst

    def _difference(self, what: str, a: Tensor, b: Tensor) -> float:
        first, second = self.names
        if a.shape != b.shape:
            raise VerificationError(
                f"{self.file}: {what} are {list(a.shape)} with {first}, {list(b.shape)} with {second}."
            )
        size = a.abs().max().item()
        difference = (a - b).abs().max().item() / (size or 1.0)
        if not difference <= self.tolerance:  # NaN too
            raise VerificationError(
                f"{self.file}: {what} differ by {difference:.2%} of their largest value between {first} and {second} "
                f"(allowed: {self.tolerance:.2%}). {self.advice}"
            )
        return difference
