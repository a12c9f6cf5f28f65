"""An opened file -> AdapterSpec, from tensor shapes and, where they are ambiguous, the header's metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .build import check_projector
from .checkpoint import AdapterCheckpoint
from .errors import AdapterError
from .infer_layers import Shapes, infer_layers
from .metadata import (
    METADATA_DIM_HEAD,
    METADATA_ENCODER,
    METADATA_KIND,
    METADATA_RESOLUTION,
    check_family,
    read_integer,
    read_negative,
    read_num_tokens,
    read_shortcut,
)
from .spec import KOLORS_TEXT_DIM, AdapterSpec, Kind, family_of

_DIM_HEAD = 64  # every published resampler
_FULL_TOKENS = 257  # ViT-H/14 at 224 pixels: 16 x 16 patches and the class token
_PORTRAIT_TOKENS = 16
_FACE_DIM = 512  # ArcFace; no published plus adapter reads features of this dim


@dataclass(frozen=True, slots=True)
class _Projector:
    """The spec fields that come from the image_proj part."""

    kind: Kind
    cross_attention_dim: int
    num_tokens: int
    image_dim: int | None = None
    face_dim: int | None = None
    hidden_dim: int | None = None
    resampler_dim: int | None = None
    depth: int | None = None
    inner_dim: int | None = None


def infer_spec(checkpoint: AdapterCheckpoint) -> AdapterSpec:
    """Describe an opened adapter. Reads shapes and metadata only, never weights or the file name.

    Raises AdapterError for a missing layer, keys without values, an unknown projector, missing or unexpected tensors,
    and metadata that contradicts the shapes.
    """
    origin, metadata = checkpoint.path, checkpoint.metadata
    dims, cross_attention_dim, lora_rank = infer_layers(checkpoint.ip_adapter.shapes, origin)
    try:
        projector = _infer_projector(checkpoint.image_proj.shapes, metadata.get(METADATA_KIND), origin)
    except AdapterError:
        raise
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise AdapterError(
            f"{origin}: the image projector is incomplete or has unexpected shapes ({error}). Export the adapter again."
        ) from error
    kolors_face = projector.kind == "faceid-plus" and projector.cross_attention_dim == KOLORS_TEXT_DIM
    if projector.cross_attention_dim != cross_attention_dim and not kolors_face:
        raise AdapterError(
            f"{origin}: the image projector makes tokens of {projector.cross_attention_dim}, the layers take "
            f"{cross_attention_dim}. The two parts belong to different adapters."
        )
    kind = _kind(projector, lora_rank, metadata, origin)
    family = family_of(cross_attention_dim, dims)
    check_family(family, metadata, origin)
    heads, dim_head = _heads(projector.inner_dim, metadata, origin)
    shortcut = read_shortcut(kind, metadata, origin)
    spec = AdapterSpec(
        kind=kind,
        family=family,
        cross_attention_dim=cross_attention_dim,
        num_tokens=read_num_tokens(kind, projector.num_tokens, metadata, origin),
        image_dim=projector.image_dim,
        face_dim=projector.face_dim,
        hidden_dim=projector.hidden_dim,
        resampler_dim=projector.resampler_dim,
        depth=projector.depth,
        heads=heads,
        dim_head=dim_head,
        layer_dims=dims,
        lora_rank=lora_rank,
        shortcut=True if kolors_face and shortcut is None else shortcut,  # its only published file is a v2
        unnormalised=kolors_face or (kind == "portrait" and projector.depth is not None),
        encoder_id=metadata.get(METADATA_ENCODER),
        negative=read_negative(metadata, origin),
        token_dim=projector.cross_attention_dim if kolors_face else None,
        encoder_resolution=read_integer(METADATA_RESOLUTION, metadata, origin),
    )
    check_projector(spec, checkpoint.image_proj.shapes, origin)
    return spec


def shortcut_hint(path: str | os.PathLike[str]) -> bool | None:
    """From the file NAME, so only a hint: True for plusv2, False for faceid-plus without v2, else None."""
    name = re.sub(r"[-_ .]", "", Path(path).name.lower())
    if "plusv2" in name:
        return True
    return False if "faceidplus" in name else None


def _infer_projector(shapes: Shapes, claimed: str | None, origin: str) -> _Projector:
    if "latents" in shapes:
        return _infer_resampler(shapes, claimed)
    if "perceiver_resampler.proj_in.weight" in shapes:
        context = shapes["norm.weight"][0]
        inner = shapes["perceiver_resampler.layers.0.0.to_q.weight"][0]
        dim, image_dim = shapes["perceiver_resampler.proj_in.weight"]
        return _Projector(
            "faceid-plus",
            context,
            _ratio(shapes["proj.2.weight"][0], context, origin),
            image_dim=image_dim,
            face_dim=shapes["proj.0.weight"][1],
            hidden_dim=shapes["proj.0.weight"][0],
            resampler_dim=dim,
            depth=_depth(shapes, "perceiver_resampler.layers."),
            inner_dim=inner,
        )
    if "proj.weight" in shapes:
        rows, image_dim = shapes["proj.weight"]
        context = shapes["norm.weight"][0]
        return _Projector("base", context, _ratio(rows, context, origin), image_dim=image_dim)
    if "proj.3.weight" in shapes:
        hidden, image_dim = shapes["proj.0.weight"]
        context = shapes["proj.3.weight"][0]
        return _Projector("full", context, _FULL_TOKENS, image_dim=image_dim, hidden_dim=hidden)
    if "proj.0.weight" in shapes and "norm.weight" in shapes:
        hidden, face_dim = shapes["proj.0.weight"]
        context = shapes["norm.weight"][0]
        tokens = _ratio(shapes["proj.2.weight"][0], context, origin)
        return _Projector("faceid", context, tokens, face_dim=face_dim, hidden_dim=hidden)
    raise AdapterError(
        f"{origin}: unknown image projector with keys {', '.join(sorted(shapes)[:4])}, ...; expected a base, plus, "
        "full, FaceID or FaceID-plus projector. This adapter is not supported."
    )


def _infer_resampler(shapes: Shapes, claimed: str | None) -> _Projector:
    dim, feature_dim = shapes["proj_in.weight"]
    # A resampler over one ArcFace vector is the un-normalised portrait adapter, unless the metadata has kind plus.
    face = feature_dim == _FACE_DIM and claimed != "plus"
    return _Projector(
        "portrait" if face else "plus",
        shapes["proj_out.weight"][0],
        shapes["latents"][1],
        image_dim=None if face else feature_dim,
        face_dim=feature_dim if face else None,
        resampler_dim=dim,
        depth=_depth(shapes, "layers."),
        inner_dim=shapes["layers.0.0.to_q.weight"][0],
    )


def _depth(shapes: Shapes, prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"layers {sorted(numbers)[:4]}..., expected 0 to {len(numbers) - 1}")
    return len(numbers)


def _ratio(rows: int, cross_attention_dim: int, origin: str) -> int:
    if rows % cross_attention_dim:
        raise AdapterError(
            f"{origin}: the projector makes {rows} numbers, which are no whole tokens of {cross_attention_dim}. Export "
            "it again."
        )
    return rows // cross_attention_dim


def _heads(inner: int | None, metadata: Mapping[str, str], origin: str) -> tuple[int | None, int | None]:
    if inner is None:
        return None, None
    dim_head = read_integer(METADATA_DIM_HEAD, metadata, origin) or _DIM_HEAD
    if inner % dim_head:
        raise AdapterError(
            f"{origin}: the resampler's attention is {inner} wide, which does not divide into heads of {dim_head}. "
            f"Put the right {METADATA_DIM_HEAD} into the file's metadata."
        )
    return inner // dim_head, dim_head


def _kind(projector: _Projector, lora_rank: int | None, metadata: Mapping[str, str], origin: str) -> Kind:
    kind = projector.kind
    if kind == "faceid" and lora_rank is None and projector.num_tokens == _PORTRAIT_TOKENS:
        kind = "portrait"
    claimed = metadata.get(METADATA_KIND)
    if claimed is None or claimed == kind:
        return kind
    if projector.kind == "faceid" and claimed in ("faceid", "portrait"):
        return cast("Kind", claimed)  # faceid and portrait have the same keys
    raise AdapterError(
        f"{origin}: its metadata says {METADATA_KIND}={claimed!r}, its tensors are those of a {kind} adapter. Correct "
        "the metadata or export it again."
    )
