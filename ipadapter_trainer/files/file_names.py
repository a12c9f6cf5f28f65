"""File names: hosts tell some adapters apart by them alone."""

from __future__ import annotations

from pathlib import Path

from ipadapter_core import AdapterSpec

from ..errors import ExportError

SUFFIXES = (".safetensors", ".bin")

_STEMS = {
    "base": "ip-adapter",
    "plus": "ip-adapter-plus",
    "full": "ip-adapter-full-face",
    "faceid": "ip-adapter-faceid",
    "portrait": "ip-adapter-faceid-portrait",
}
_FAMILIES = {"sd15": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
# Encoders by the width of what the adapter reads: image_embeds for base, hidden states for the others.
_ENCODERS = {"base": {768: "L", 1024: "H", 1280: "G"}, "other": {1024: "L", 1280: "H", 1664: "G"}}


def published_name(spec: AdapterSpec, suffix: str = ".safetensors") -> str:
    """The name in the style of the published files (huggingface.co/h94/IP-Adapter and IP-Adapter-FaceID), such as
    "ip-adapter-plus_sdxl_vit-h.safetensors", which the hosts that look at names find.

    An SDXL name without encoder means ViT-bigG for base, an SD1.5 name ViT-H. Raises ExportError for a faceid-plus
    adapter that does not say whether it is v1 or v2.
    """
    return f"{_stem(spec)}_{_FAMILIES.get(spec.family, spec.family)}{_encoder(spec)}{suffix}"


def _stem(spec: AdapterSpec) -> str:
    if spec.kind != "faceid-plus":
        return _STEMS[spec.kind]
    if spec.shortcut is None:
        raise ExportError(
            "This faceid-plus adapter does not say whether it is v1 or v2, and hosts tell them apart by the file's "
            "name. Use `ipadapter convert --version v2` (or v1) with a file name."
        )
    return "ip-adapter-faceid-plusv2" if spec.shortcut else "ip-adapter-faceid-plus"


def _encoder(spec: AdapterSpec) -> str:
    if spec.unnormalised:
        return "_unnorm"
    if spec.image_dim is None or spec.kind == "faceid-plus":
        return ""
    letter = _ENCODERS["base" if spec.kind == "base" else "other"].get(spec.image_dim)
    usual = "G" if spec.family == "sdxl" and spec.kind == "base" else "H"
    if letter is None or (letter == usual and (usual == "G" or spec.family != "sdxl")):
        return ""
    return f"_vit-{letter.lower() if letter == 'H' else letter}"


def name_problem(name: str, spec: AdapterSpec) -> str | None:
    """Why a host would take a file of this name for another kind, and a name that works; None when it would not.

    ComfyUI_IPAdapter_plus reads "plusv2" and "unnorm" in the name as the variant itself, and its presets find
    portrait files by "portrait"; every other kind is told by its tensors.
    """
    word = Path(name).name.lower()
    v2 = "plusv2" in word
    reason = None
    if spec.kind == "faceid-plus" and spec.shortcut is True and not v2:
        reason = "has no 'plusv2' in it: hosts will take it for faceid-plus v1"
    elif v2 and not (spec.kind == "faceid-plus" and spec.shortcut in (True, None)):
        what = "faceid-plus v1" if spec.kind == "faceid-plus" else f"a {spec.kind} adapter"
        reason = f"has 'plusv2' in it, but this is {what}: hosts will take it for faceid-plus v2"
    elif spec.unnormalised and "unnorm" not in word:
        reason = "has no 'unnorm' in it: hosts will feed it normalised face embeddings"
    elif not spec.unnormalised and "unnorm" in word:
        reason = "has 'unnorm' in it, but this adapter takes normalised face embeddings"
    elif spec.kind == "portrait" and "portrait" not in word:
        reason = "has no 'portrait' in it: the presets of hosts will not find it"
    if reason is None:
        return None
    suffix = Path(name).suffix if Path(name).suffix in SUFFIXES else SUFFIXES[0]
    works = published_name(spec, suffix) if spec.kind != "faceid-plus" or spec.shortcut is not None else None
    return f"The name {Path(name).name} {reason}." + (f" A name that works: {works}" if works else "")
