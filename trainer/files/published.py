"""The published file format as a table: every key and shape of an adapter, and what hosts hard-code about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ipadapter_core import FAMILIES, FAMILY_NAMES, AdapterSpec, Kind, new_spec

Shape = tuple[int, ...]

# Sides are products: "4W" is 4 x W, "TD" is T x D. B: the width of a layer, C: what its key and value read.
# D: text, T: tokens, E: image features, F: face embedding, H: the MLP's inside, W: resampler, I: its attention.
_NORM = {"norm.weight": "D", "norm.bias": "D"}
_FACE = {"proj.0.weight": "H F", "proj.0.bias": "H", "proj.2.weight": "TD H", "proj.2.bias": "TD", **_NORM}
_RESAMPLER = {
    "proj_in.weight": "W E",
    "proj_in.bias": "W",
    "proj_out.weight": "D W",
    "proj_out.bias": "D",
    "norm_out.weight": "D",
    "norm_out.bias": "D",
}
_RESAMPLER_LAYER = {
    "0.norm1.weight": "W",
    "0.norm1.bias": "W",
    "0.norm2.weight": "W",
    "0.norm2.bias": "W",
    "0.to_q.weight": "I W",
    "0.to_kv.weight": "2I W",
    "0.to_out.weight": "W I",
    "1.0.weight": "W",
    "1.0.bias": "W",
    "1.1.weight": "4W W",
    "1.3.weight": "W 4W",
}
_PROJECTORS: Mapping[Kind, Mapping[str, str]] = {
    "base": {"proj.weight": "TD E", "proj.bias": "TD", **_NORM},
    "plus": {"latents": "1 T W", **_RESAMPLER},
    "full": {
        "proj.0.weight": "H E",
        "proj.0.bias": "H",
        "proj.2.weight": "D H",
        "proj.2.bias": "D",
        "proj.3.weight": "D",
        "proj.3.bias": "D",
    },
    "faceid": _FACE,
    "faceid-plus": {**_FACE, **{f"perceiver_resampler.{key}": shape for key, shape in _RESAMPLER.items()}},
    "portrait": _FACE,
}
_KEY_VALUE = {"to_k_ip.weight": "B D", "to_v_ip.weight": "B D"}
_LORA = {
    "to_q_lora.down.weight": "R B",
    "to_q_lora.up.weight": "B R",
    "to_k_lora.down.weight": "R C",
    "to_k_lora.up.weight": "B R",
    "to_v_lora.down.weight": "R C",
    "to_v_lora.up.weight": "B R",
    "to_out_lora.down.weight": "R B",
    "to_out_lora.up.weight": "B R",
}


def published_shapes(spec: AdapterSpec) -> dict[str, Shape]:
    """Every flat key of an adapter's file and its shape: `image_proj.*`, then `ip_adapter.*`.

    A table of its own, not asked of the modules, so that a change of theirs cannot change the format unnoticed.
    """
    return dict(_projector(spec)) | dict(_layers(spec))


def _projector(spec: AdapterSpec) -> Iterator[tuple[str, Shape]]:
    resampled = spec.depth is not None
    face_resampler = spec.kind == "portrait" and resampled  # over un-normalised face embeddings
    sides = {
        "D": spec.context_width,
        "T": spec.tokens,
        "E": spec.face_width if face_resampler else spec.image_width,
        "F": spec.face_width,
        "H": spec.hidden_width,
        "W": spec.resampler_width,
        "I": (spec.heads or 0) * (spec.dim_head or 0),
    }
    for key, shape in _PROJECTORS["plus" if face_resampler else spec.kind].items():
        yield f"image_proj.{key}", _shape(shape, sides)
    prefix = "perceiver_resampler." if spec.kind == "faceid-plus" else ""
    for layer in range(spec.depth or 0):
        for key, shape in _RESAMPLER_LAYER.items():
            yield f"image_proj.{prefix}layers.{layer}.{key}", _shape(shape, sides)


def _layers(spec: AdapterSpec) -> Iterator[tuple[str, Shape]]:
    for id in range(2 * len(spec.layer_widths)):
        width = spec.layer_widths[id // 2]
        cross = id % 2 == 1
        sides = {
            "B": width,
            "C": spec.context_width if cross else width,
            "D": spec.context_width,
            "R": spec.lora_rank,
        }
        tensors = (_KEY_VALUE if cross else {}) | (_LORA if spec.lora_rank is not None else {})
        for key, shape in tensors.items():
            yield f"ip_adapter.{id}.{key}", _shape(shape, sides)


def _shape(text: str, sides: Mapping[str, int | None]) -> Shape:
    return tuple(prod(int(c) if c.isdecimal() else sides[c] or 0 for c in side) for side in text.split())


def published_differences(spec: AdapterSpec) -> tuple[str, ...]:
    """What is unlike every published adapter of this kind, as clauses for people; hosts hard-code these numbers
    (ComfyUI_IPAdapter_plus the tokens, the depth and the heads, diffusers the depth and the width of a head).
    """
    if spec.family not in FAMILIES:
        models = ", ".join(FAMILY_NAMES.values())
        return (f"made for a UNet of its own ({spec.family_name}, {len(spec.layer_widths)} layers), not for {models}",)
    published = new_spec(spec.kind, spec.layer_widths, spec.context_width)
    named = {"tokens": "tokens", "depth": "resampler layers", "heads": "heads", "dim_head": "channels per head"}
    named |= {"resampler_width": "channels in the resampler", "lora_rank": "ranks of LoRA"}
    if spec.unnormalised:  # the published one has no counterpart in new_spec
        named = {"tokens": "tokens"}
    return tuple(
        f"{getattr(spec, field)} {what} where the published files have {getattr(published, field)}"
        for field, what in named.items()
        if getattr(spec, field) != getattr(published, field)
    )
