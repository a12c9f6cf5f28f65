"""The check of a written adapter file: read back as its users will read it, and compared with the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import (
    AdapterCheckpoint,
    AdapterError,
    AdapterSpec,
    IPAdapter,
    adapter_from_checkpoint,
    export_state,
    infer_spec,
    read_checkpoint,
    with_shortcut,
)

from ..errors import VerificationError
from .opening import cast_adapter
from .published import published_differences, published_shapes

if TYPE_CHECKING:
    from .diffusers_loader import DiffusersAdapter

DIFFUSERS = f"diffusers {version('diffusers')}"
# Largest share of an output's largest value. Between two loaders of the same weights only the order of sums differs;
# rounding the weights costs 2^-11 of each in float16 and 2^-8 in bfloat16, and a few times that at the outputs.
LOADER_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
_FREE_METADATA = ("encoder_id", "negative")  # fields of a spec that come from the metadata, not from the tensors


@dataclass(frozen=True)
class Verification:
    """The result for a file that passed. `loaders` read it and agree; `rounding` is the largest difference to the
    outputs of the original weights and `disagreement` that between the loaders, both as shares of the output's largest
    value. `notes` list what was not checked, and what hosts do differently.
    """

    file: Path
    tensors: int
    dtypes: tuple[str, ...]
    loaders: tuple[str, ...]
    rounding: float
    disagreement: float
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """A summary line, then the notes."""
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
    """Read a .safetensors or .bin file with ipadapter_core and, if `with_diffusers` and its loader supports the
    adapter, with diffusers. Compare it with `reference`: keys and shapes with the published format, every tensor
    bitwise (after rounding to the file's dtype), the tokens and each layer's keys and values for fixed random features,
    and `metadata` with the header of a .safetensors file.

    Raises VerificationError that names the key or layer and both numbers. The file stays.
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
    outputs = _outputs(adapter)
    rounding = _compare(
        file,
        {"the original weights": _outputs(reference), "the file's": outputs},
        tolerance=max(ROUNDING_TOLERANCE[dtype] for dtype in dtypes),
        advice=f"{' and '.join(names)} is too coarse for these weights; write the file in float32.",
    )
    loaders, disagreement = ["ipadapter_core"], 0.0
    if with_diffusers:
        found = verify_with_diffusers(file, adapter, outputs)
        if isinstance(found, str):
            notes.append(f"{DIFFUSERS} cannot load it ({found}), so it was checked with ipadapter_core alone.")
        else:
            disagreement = found
            loaders.append(DIFFUSERS)
            if spec.shortcut:
                notes.append("diffusers reads no v2 from a file: set shortcut = True on its image projection layer.")
    notes += [f"{difference[0].upper()}{difference[1:]}." for difference in published_differences(spec)]
    count = len(checkpoint.image_proj) + len(checkpoint.ip_adapter)
    return Verification(file, count, names, tuple(loaders), rounding, disagreement, tuple(notes))


def verify_with_diffusers(file: Path, adapter: IPAdapter, outputs: dict[str, Tensor] | None = None) -> float | str:
    """The largest difference between the outputs of `adapter`, as ipadapter_core read it from the file, and of the
    file loaded by diffusers; or why diffusers' loader does not support such an adapter. `outputs` are those of
    `adapter`, where they are known.

    Raises VerificationError when that loader fails, its import included, or when the outputs differ.
    """
    spec = _spec_in_use(adapter)
    try:
        # Imported here, so that a broken loader does not break this module.
        from .diffusers_loader import load_with_diffusers, unsupported

        reason = unsupported(spec)
        if reason is not None:
            return reason
        loaded = load_with_diffusers(file, spec)
    except Exception as error:  # of any class: its users would get it too
        raise VerificationError(f"{file}: {DIFFUSERS} does not load it ({type(error).__name__}: {error}).") from error
    for name, weight in adapter.lora.state_dict().items() if adapter.lora is not None else ():
        id, part, side, _ = name.split(".")
        found = loaded.lora(int(id), part, side)
        if found is None or not torch.equal(found, weight):
            raise VerificationError(f"{file}: {DIFFUSERS} reads another LoRA tensor than ip_adapter.{name}, or none.")
    return _compare(
        file,
        {"ipadapter_core": outputs or _outputs(adapter), DIFFUSERS: _outputs(loaded)},
        tolerance=LOADER_TOLERANCE,
        advice="Its users would get other images; do not publish it, and report this with the output of `inspect`.",
    )


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


@torch.no_grad()
def _outputs(adapter: IPAdapter | DiffusersAdapter) -> dict[str, Tensor]:
    """The tokens of random features, and their keys and values by layer, in float32."""
    if isinstance(adapter, IPAdapter):
        unknown_version = adapter.spec.kind == "faceid-plus" and adapter.spec.shortcut is None
        if unknown_version or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in adapter.parameters()):
            adapter = cast_adapter(adapter, torch.float32)
        if unknown_version:
            projector: Any = adapter.projector
            projector.shortcut = False  # a file of unknown version is compared as v1
    tokens = adapter.encode(*random_features(adapter.spec))
    outputs = {"the tokens": tokens}
    for id, pair in zip(adapter.spec.layer_ids, adapter.keys_values(tokens), strict=True):
        outputs |= {f"the keys of layer {id}": pair.key, f"the values of layer {id}": pair.value}
    return outputs


def _compare(file: Path, outputs: Mapping[str, dict[str, Tensor]], *, tolerance: float, advice: str) -> float:
    """The largest difference between two outputs, as a share of the largest value; `tolerance` is the largest allowed.

    Raises VerificationError beyond it.
    """
    (first, ones), (second, others) = outputs.items()
    worst = 0.0
    for what, one in ones.items():
        other = others[what]
        if one.shape != other.shape:
            raise VerificationError(
                f"{file}: {what} are {list(one.shape)} with {first}, {list(other.shape)} with {second}."
            )
        difference = (one - other).abs().max().item() / (one.abs().max().item() or 1.0)
        if not difference <= tolerance:  # NaN too
            raise VerificationError(
                f"{file}: {what} differ by {difference:.2%} of their largest value between {first} and {second} "
                f"(allowed: {tolerance:.2%}). {advice}"
            )
        worst = max(worst, difference)
    return worst


def _spec_in_use(adapter: IPAdapter) -> AdapterSpec:
    """The spec, with the shortcut that is set in the projector."""
    return with_shortcut(adapter.spec, getattr(adapter.projector, "shortcut", None))


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
    """Compare the file's spec with the original; returns notes on what a .bin cannot hold."""
    is_bin = file.suffix == ".bin"
    notes: list[str] = []
    for name in (field.name for field in fields(AdapterSpec) if field.name not in _FREE_METADATA):
        read, meant = getattr(found, name), getattr(wanted, name)
        if read == meant:
            continue
        if is_bin and (name == "shortcut" or (name == "num_tokens" and wanted.kind == "full")):
            notes.append(f"A .bin has no header, so this one does not say that {name} is {meant!r}.")
        else:
            hint = " A .bin has no header that could hold it; use .safetensors." if is_bin else ""
            raise VerificationError(f"{file}: its {name} reads as {read!r}, it was {meant!r}.{hint}")
    return notes


def _check_metadata(checkpoint: AdapterCheckpoint, wanted: Mapping[str, str]) -> list[str]:
    if Path(checkpoint.path).suffix == ".bin":
        return [f"A .bin has no header: {len(wanted)} entries of metadata are left out."] if wanted else []
    for key, value in wanted.items():
        if checkpoint.metadata.get(key) != value:
            raise VerificationError(
                f"{checkpoint.path}: its metadata has {key}={checkpoint.metadata.get(key)!r}, it was {value!r}."
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
