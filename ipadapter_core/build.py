"""AdapterSpec -> modules: on the meta device for loading, with fresh weights for training."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .checkpoint import AdapterCheckpoint
from .errors import AdapterError
from .layers import ImageKeyValueLayers
from .lora import LoraLayers
from .operations import Operations
from .projectors import FaceIDPlusProjection, FaceIDProjection, FullProjection, ImageProjection, Resampler
from .spec import AdapterSpec
from .tensors import TensorMap


def build_projector(
    spec: AdapterSpec,
    *,
    operations: Operations = nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The projector of a spec with fresh weights, or without any when `device="meta"`.

    Its state dict has the keys of the file's `image_proj` part. Features in, tokens [B, T, D] out.

    Raises AdapterError when the spec lacks a width that its kind needs.
    """
    spec_of = _Required(spec)
    context = spec.token_dim or spec.cross_attention_dim
    if spec.kind == "base":
        return ImageProjection(
            spec_of("image_dim"), context, spec.num_tokens, operations=operations, device=device, dtype=dtype
        )
    if spec.kind == "full":
        return FullProjection(
            spec_of("image_dim"),
            context,
            spec.hidden_dim,
            operations=operations,
            device=device,
            dtype=dtype,
        )
    if spec.kind == "faceid-plus":
        return FaceIDPlusProjection(
            spec_of("face_dim"),
            spec_of("image_dim"),
            context,
            spec.num_tokens,
            hidden_dim=spec.hidden_dim,
            depth=spec_of("depth"),
            heads=spec_of("heads"),
            dim_head=spec_of("dim_head"),
            shortcut=spec.shortcut,
            operations=operations,
            device=device,
            dtype=dtype,
        )
    if spec.depth is not None:  # plus, and the portrait adapter over un-normalised face embeddings
        return Resampler(
            spec_of("image_dim" if spec.kind == "plus" else "face_dim"),
            context,
            spec.num_tokens,
            width=spec_of("resampler_dim"),
            depth=spec.depth,
            heads=spec_of("heads"),
            dim_head=spec_of("dim_head"),
            operations=operations,
            device=device,
            dtype=dtype,
        )
    return FaceIDProjection(
        spec_of("face_dim"),
        context,
        spec.num_tokens,
        spec.hidden_dim,
        operations=operations,
        device=device,
        dtype=dtype,
    )


class _Required:
    """Reads a field that the kind cannot do without."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec

    def __call__(self, field: str) -> int:
        value = cast("int | None", getattr(self._spec, field))
        if value is None:
            raise AdapterError(f"A {self._spec.kind} adapter needs {field}, which is None in its spec. Set it.")
        return value


def build_layers(
    spec: AdapterSpec,
    *,
    operations: Operations = nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ImageKeyValueLayers:
    """The image key and value layers of a spec; see `build_projector`."""
    return ImageKeyValueLayers(
        spec.layer_ids,
        spec.layer_dims,
        spec.cross_attention_dim,
        operations=operations,
        device=device,
        dtype=dtype,
    )


def build_lora(
    spec: AdapterSpec,
    *,
    operations: Operations = nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoraLayers | None:
    """The LoRA of a spec; None when it has none."""
    if spec.lora_rank is None:
        return None
    return LoraLayers(
        spec.layer_dims,
        spec.cross_attention_dim,
        spec.lora_rank,
        operations=operations,
        device=device,
        dtype=dtype,
    )


def load_projector(
    checkpoint: AdapterCheckpoint,
    spec: AdapterSpec,
    *,
    operations: Operations = nn,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The projector with the file's weights. Nothing is initialised: modules are built on meta and assigned.

    Raises AdapterError when a tensor is missing, unexpected, of another shape, or not finite.
    """
    module = build_projector(spec, operations=operations, device="meta")
    assign(module, checkpoint.image_proj, checkpoint.path, dtype)
    return module


def load_layers(
    checkpoint: AdapterCheckpoint,
    spec: AdapterSpec,
    *,
    operations: Operations = nn,
    dtype: torch.dtype | None = None,
) -> tuple[ImageKeyValueLayers, LoraLayers | None]:
    """The key and value layers and the LoRA with the file's weights; see `load_projector`."""
    layers = build_layers(spec, operations=operations, device="meta")
    assign(layers, checkpoint.ip_adapter, checkpoint.path, dtype)
    lora = build_lora(spec, operations=operations, device="meta")
    if lora is not None:
        assign(lora, checkpoint.ip_adapter, checkpoint.path, dtype)
    return layers, lora


def assign(module: nn.Module, tensors: TensorMap, origin: str, dtype: torch.dtype | None = None) -> None:
    """Give a meta module the tensors of its own keys (frozen). Shapes are compared first."""
    wanted = check_tensors(module, tensors, origin)
    state = {name: tensors[name] if dtype is None else tensors[name].to(dtype) for name in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def check_tensors(module: nn.Module, tensors: TensorMap, origin: str) -> list[str]:
    """The names of a module's tensors. Raises AdapterError when one is missing or of another shape, or there are
    more."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in wanted.items():
        if tensors.shapes.get(name) != shape:
            raise AdapterError(
                f"{origin}: the tensor {name} is {tensors.shapes.get(name, 'missing')}, expected {shape}. Download or "
                "export the adapter again."
            )
    # K/V layers and LoRA are two modules over one part of the file; infer_spec has checked its keys.
    shared = isinstance(module, (ImageKeyValueLayers, LoraLayers))
    extra = [] if shared else [name for name in tensors if name not in wanted]
    if extra:
        raise AdapterError(
            f"{origin}: {len(extra)} unexpected tensors, the first is {extra[0]}. This adapter is not supported."
        )
    return list(wanted)
