"""AdapterSpec -> projector, and the check of a file's projector against its spec."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from torch import nn

from .empty import without_weights
from .errors import AdapterError
from .operations import Operations
from .projectors import FaceIDPlusProjection, FaceIDProjection, FullProjection, ImageProjection, Resampler
from .spec import AdapterSpec


def build_projector(spec: AdapterSpec, *, operations: Operations = nn) -> nn.Module:
    """The projector of a spec with fresh weights; inside `with torch.device("meta")` it takes no memory.

    Its state dict has the keys of the file's `image_proj` part. Features in, tokens [B, T, D] out.
    """
    dim = spec.token_dim or spec.cross_attention_dim
    image_dim, face_dim = cast("int", spec.image_dim), cast("int", spec.face_dim)
    resampler = {"depth": spec.depth, "heads": spec.heads, "dim_head": spec.dim_head}
    if spec.kind == "base":
        return ImageProjection(image_dim, dim, spec.num_tokens, operations=operations)
    if spec.kind == "full":
        return FullProjection(image_dim, dim, spec.hidden_dim, operations=operations)
    if spec.kind == "faceid-plus":
        return FaceIDPlusProjection(
            face_dim,
            image_dim,
            dim,
            spec.num_tokens,
            hidden_dim=spec.hidden_dim,
            shortcut=spec.shortcut,
            operations=operations,
            **cast("dict[str, int]", resampler),
        )
    if spec.depth is not None:  # plus, and the portrait adapter over un-normalised face embeddings
        return Resampler(
            image_dim if spec.kind == "plus" else face_dim,
            dim,
            spec.num_tokens,
            dim=cast("int", spec.resampler_dim),
            operations=operations,
            **cast("dict[str, int]", resampler),
        )
    return FaceIDProjection(face_dim, dim, spec.num_tokens, spec.hidden_dim, operations=operations)


def check_projector(spec: AdapterSpec, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Compare the shapes of a file's projector with those that the spec builds; `origin` is the file.

    Raises AdapterError for a missing or unexpected tensor, or one of another shape.
    """
    expected = _projector_shapes(spec)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise AdapterError(
                f"{origin}: the tensor {name} is {shapes.get(name, 'missing')}, expected {shape}. Download or "
                "export the adapter again."
            )
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        raise AdapterError(
            f"{origin}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}. This adapter is not "
            "supported."
        )


@lru_cache(maxsize=16)
def _projector_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    with without_weights():
        return {name: tuple(tensor.shape) for name, tensor in build_projector(spec).state_dict().items()}
