"""What hosts expect of adapter files: their names, their keys and shapes, and the numbers that hosts hard-code."""

from __future__ import annotations

from pathlib import Path

from ipadapter_core import FAMILIES, FAMILY_NAMES, AdapterSpec, IPAdapter, export_state, new_spec
from ipadapter_core.empty import without_weights
from ipadapter_core.published_encoders import CLIP_BIGG, CLIP_H, CLIP_L, encoders_of_dim

from ..errors import ExportError
from ..settings.kinds import TRAIN_KINDS

SUFFIXES = (".safetensors", ".bin")
PREFIX = "ip-adapter"  # of every published name

_FAMILIES = {"sd15": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
_ENCODERS = {CLIP_L: "vit-L", CLIP_H: "vit-h", CLIP_BIGG: "vit-G"}


def published_name(spec: AdapterSpec, suffix: str = ".safetensors") -> str:
    """The name in the style of the published files (huggingface.co/h94/IP-Adapter and IP-Adapter-FaceID), such as
    "ip-adapter-plus_sdxl_vit-h.safetensors".

    A name without encoder means ViT-H for SD1.5 and ViT-bigG for base on SDXL. Raises ExportError for a faceid-plus
    adapter whose version, v1 or v2, is unknown.
    """
    if spec.kind == "faceid-plus" and spec.shortcut is None:
        raise ExportError(
            "It is unknown whether this faceid-plus adapter is v1 or v2, and hosts tell them apart by the file's name. "
            "Use `ipadapter convert --version v2` (or v1) with a file name."
        )
    versions = (kind for kind in TRAIN_KINDS.values() if (kind.kind, kind.shortcut) == (spec.kind, spec.shortcut))
    stem = f"{PREFIX}{next(versions).file_suffix}"
    return f"{stem}_{_FAMILIES.get(spec.family, spec.family)}{_encoder(spec)}{suffix}"


def _encoder(spec: AdapterSpec) -> str:
    if spec.unnormalised:
        return "_unnorm"
    if spec.image_dim is None or spec.kind == "faceid-plus":
        return ""
    implied = CLIP_H if spec.family != "sdxl" else CLIP_BIGG if spec.kind == "base" else None
    for encoder in encoders_of_dim(spec.image_dim, embeds=spec.kind == "base"):
        if encoder in _ENCODERS:
            return "" if encoder == implied else f"_{_ENCODERS[encoder]}"
    return ""


def name_problem(name: str, spec: AdapterSpec) -> str | None:
    """Why a host would take a file of this name for another kind, and a name that works; None when it would not.

    ComfyUI_IPAdapter_plus takes "plusv2" and "unnorm" in the name for the variant, and its presets find portrait files
    by "portrait"; it detects every other kind from the tensors.
    """
    file = Path(name)
    word = file.name.lower()
    is_plus = spec.kind == "faceid-plus"
    reason = None
    if is_plus and spec.shortcut and "plusv2" not in word:
        reason = "has no 'plusv2' in it: hosts will take it for faceid-plus v1"
    elif "plusv2" in word and not (is_plus and spec.shortcut is not False):
        what = "faceid-plus v1" if is_plus else f"a {spec.kind} adapter"
        reason = f"has 'plusv2' in it, but this is {what}: hosts will take it for faceid-plus v2"
    elif spec.unnormalised and "unnorm" not in word:
        reason = "has no 'unnorm' in it: hosts will feed it normalised face embeddings"
    elif not spec.unnormalised and "unnorm" in word:
        reason = "has 'unnorm' in it, but this adapter takes normalised face embeddings"
    elif spec.kind == "portrait" and "portrait" not in word:
        reason = "has no 'portrait' in it: the presets of hosts will not find it"
    if reason is None:
        return None
    problem = f"The name {file.name} {reason}."
    if is_plus and spec.shortcut is None:
        return problem
    works = published_name(spec, file.suffix if file.suffix in SUFFIXES else SUFFIXES[0])
    return f"{problem} A name that works: {works}"


def published_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Every flat key of an adapter's file and its shape: `image_proj.*`, then `ip_adapter.*`."""
    with without_weights():
        return {key: tuple(tensor.shape) for key, tensor in export_state(IPAdapter(spec)).items()}


def published_differences(spec: AdapterSpec) -> tuple[str, ...]:
    """How an adapter differs from all published ones of its kind, as clauses for messages. Hosts hard-code these
    numbers: ComfyUI_IPAdapter_plus the tokens, the depth and the heads, diffusers the depth and the dim of a head.
    """
    if spec.family not in FAMILIES:
        models = ", ".join(FAMILY_NAMES.values())
        return (f"made for a UNet of its own ({spec.family_name}, {len(spec.layer_dims)} layers), not for {models}",)
    published = new_spec(spec.kind, spec.layer_dims, spec.cross_attention_dim)
    fields = {"num_tokens": "tokens"}
    if not spec.unnormalised:  # new_spec has no such adapter
        fields |= {"depth": "resampler layers", "heads": "heads", "dim_head": "channels per head"}
        fields |= {"resampler_dim": "channels in the resampler", "lora_rank": "ranks of LoRA"}
    return tuple(
        f"{getattr(spec, field)} {what} where the published files have {getattr(published, field)}"
        for field, what in fields.items()
        if getattr(spec, field) != getattr(published, field)
    )
