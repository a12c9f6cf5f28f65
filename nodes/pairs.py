"""The adapter and image encoder in the model folders that fit a model and a use best, by their tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import nn

from ..ipadapter_core import (
    FAMILY_NAMES,
    AdapterError,
    AdapterSpec,
    Kind,
    Site,
    check_compatible,
    family_of,
    is_kolors_unet,
)
from ..ipadapter_core.encoders import find_encoder
from .demo import BUNDLED, demo_files
from .files import ADAPTERS, ENCODERS, H94, adapter_spec, encoder_shape, main_folder, model_files

SUBJECT, STYLE, COMPOSITION, FACE = USES = ("subject", "style", "composition", "face")
LIGHT, STANDARD, PLUS = LIKENESS = ("light", "standard", "plus")

_KINDS: dict[str, tuple[Kind, ...]] = {
    LIGHT: ("base", "plus", "full"),
    STANDARD: ("base", "plus", "full"),
    PLUS: ("plus", "full", "base"),
}
# Files for faces or composition have the shapes of all others, so among files with fitting shapes the name decides.
_HINTS = {FACE: re.compile("face"), COMPOSITION: re.compile("composition"), LIGHT: re.compile("light(?!ning)")}
_FACE_NODES = "Load IP Adapter, Load Face Analysis, Encode Face Prompt and Apply IP Adapter"
_KOLORS_PAGE = "https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus"
_DOWNLOADS = {
    ("sd15", LIGHT): "models/ip-adapter_sd15_light.safetensors",
    ("sd15", STANDARD): "models/ip-adapter_sd15.safetensors",
    ("sd15", PLUS): "models/ip-adapter-plus_sd15.safetensors",
    ("sd15", FACE): "models/ip-adapter-plus-face_sd15.safetensors",
    ("sdxl", LIGHT): "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
    ("sdxl", STANDARD): "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
    ("sdxl", PLUS): "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
    ("sdxl", FACE): "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
}


@dataclass(frozen=True)
class Pair:
    """An adapter file and its encoder's (a folder for the bundled one). `notes` are for the user."""

    name: str
    adapter: Path
    encoder: Path
    spec: AdapterSpec
    notes: tuple[str, ...] = ()

    @property
    def is_for_composition(self) -> bool:
        """Whether it was trained on composition only, by its name, and so needs no weight type for it."""
        return bool(_HINTS[COMPOSITION].search(_file_name(self.name)))

    def describe(self) -> str:
        if self.name == BUNDLED:
            return f"{self.name} with its own image encoder"
        encoder = "the image encoder of the demo" if self.encoder.is_dir() else self.encoder.name
        return f"{self.name} ({self.spec.kind} adapter for {self.spec.family_name}) with {encoder}"


@dataclass(frozen=True)
class _Candidate:
    name: str
    path: Path
    spec: AdapterSpec

    def mismatch(self, use_for: str) -> int:
        """How badly its name suits a use; 0 is best."""
        named = {use for use in (FACE, COMPOSITION) if _HINTS[use].search(_file_name(self.name))}
        return len(named ^ ({use_for} & {FACE, COMPOSITION}))

    def rank(self, use_for: str, likeness: str) -> tuple[Any, ...]:
        light = bool(_HINTS[LIGHT].search(_file_name(self.name)))
        return self.mismatch(use_for), _KINDS[likeness].index(self.spec.kind), light is not (likeness == LIGHT)


def _file_name(name: str) -> str:
    """Without its folders."""
    return PureWindowsPath(name).name.lower()


def find_pair(unet: nn.Module, sites: Sequence[Site], use_for: str, likeness: str) -> Pair:
    """The best pair of models/ipadapter and models/clip_vision; for the model of Load IP Adapter Demo its encoder is
    there too, and its adapter where no other one fits.

    Raises AdapterError that names the file that is missing, its folder and its page.
    """
    candidates, faces, others = _candidates(unet, sites)
    demo = demo_files()
    if demo is not None and not _fits(demo.spec, unet, sites):
        demo = None
    if not candidates and demo is None:
        raise _missing(unet, sites, use_for, likeness, faces, others)
    ranked = sorted(candidates, key=lambda candidate: candidate.rank(use_for, likeness))  # stable: safetensors first
    encoders, first_error = model_files(ENCODERS), None
    for candidate in ranked:
        spec, name = candidate.spec, candidate.name
        try:
            encoder = find_encoder(spec, encoders, name=name, folder=main_folder(ENCODERS), open_file=encoder_shape)
        except AdapterError as error:
            first_error = first_error or error
            if demo is None or not demo.fits(spec):
                continue
            encoder = demo.encoder_folder  # that of the emoji model, on which the adapter was trained
        notes = _notes(candidate, ranked, faces, use_for, likeness)
        return Pair(name, candidate.path, encoder, spec, notes)
    if demo is not None:
        notes = tuple(f"The image encoder of {each.name} is not in {main_folder(ENCODERS)}." for each in ranked[:1])
        return Pair(BUNDLED, demo.adapter, demo.encoder_folder, demo.spec, notes)
    assert first_error is not None
    raise first_error


def _candidates(unet: nn.Module, sites: Sequence[Site]) -> tuple[list[_Candidate], list[str], list[str]]:
    """The adapters that fit the model and need no face models, the names of those that fit and need them, and what
    the other files are.
    """
    found: list[_Candidate] = []
    faces: list[str] = []
    others: list[str] = []
    for path, name in model_files(ADAPTERS).items():
        try:
            spec = adapter_spec(path)
        except (AdapterError, OSError):
            others.append(f"{name} (no adapter that is read)")
            continue
        fits = _fits(spec, unet, sites)
        if fits and spec.face_dim is None:
            found.append(_Candidate(name, path, spec))
            continue
        if fits:
            faces.append(name)
        others.append(f"{name} ({spec.kind} for {spec.family_name})")
    return found, faces, others


def _fits(spec: AdapterSpec, unet: nn.Module, sites: Sequence[Site]) -> bool:
    try:
        check_compatible(spec, sites, unet=unet)
    except AdapterError:
        return False
    return True


def _notes(
    chosen: _Candidate, ranked: Sequence[_Candidate], faces: Sequence[str], use_for: str, likeness: str
) -> tuple[str, ...]:
    """Notes for the user about the choice."""
    notes: list[str] = []
    own, kind = chosen.mismatch(use_for), chosen.spec.kind
    if any(other.spec.kind == kind and other.mismatch(use_for) != own for other in ranked):
        notes.append("Its name decided: files for faces and composition have the shapes of the others.")
    if use_for == FACE and own:
        notes.append("No file here has face in its name (plus-face, full-face), so a general one is used.")
        if faces:
            notes.append(f"{faces[0]} keeps a face better, but needs face models: {_FACE_NODES}.")
    if kind != _KINDS[likeness][0]:
        notes.append(f"Likeness {likeness} asks for a {_KINDS[likeness][0]} adapter, of which none is usable here.")
    if chosen is not ranked[0]:
        notes.append(f"{ranked[0].name} fits better, but its image encoder is not in {main_folder(ENCODERS)}.")
    return tuple(notes)


def _missing(
    unet: nn.Module,
    sites: Sequence[Site],
    use_for: str,
    likeness: str,
    faces: Sequence[str],
    others: Sequence[str],
) -> AdapterError:
    context, widths = sites[0].cross_attention_dim, [site.dim for site in sites]
    family = "kolors" if is_kolors_unet(unet) else family_of(context, widths)
    file = _DOWNLOADS.get((family, FACE if use_for == FACE else likeness))
    page = H94
    if family == "kolors":
        file, page = "ip_adapter_plus_general.bin", _KOLORS_PAGE
    model = "Kolors" if family == "kolors" else FAMILY_NAMES.get(family)
    looked = f" Looked at: {'; '.join(others)}." if others else ""
    if use_for == FACE and faces:
        looked = f" Or use {faces[0]}, which needs face models, with other nodes: {_FACE_NODES}."
    if file is None:
        what = f"{model} model" if model else f"model (context {context}, {len(sites)} layers)"
        return AdapterError(
            f"No adapter in {main_folder(ADAPTERS)} fits the connected {what}, and none for it is published. Put one "
            f"that was trained on it there, or connect an SD1.5 or SDXL model.{looked}"
        )
    return AdapterError(
        f"No adapter for {model} is in {main_folder(ADAPTERS)}. Download {file} from {page} and put it there.{looked}"
    )
