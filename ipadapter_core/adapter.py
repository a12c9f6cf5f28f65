"""A whole adapter: projector, key and value layers and LoRA, loaded from a file, new, and saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .attention import KeyValue
from .build import build_projector
from .checkpoint import AdapterCheckpoint, read_checkpoint
from .empty import without_weights
from .errors import AdapterError
from .infer import infer_spec
from .layers import ImageKeyValueLayers
from .lora import LoraLayers
from .metadata import OF_THE_TENSORS, spec_metadata
from .operations import Operations
from .projectors import FaceIDPlusProjection
from .spec import AdapterSpec, with_shortcut
from .tensors import value_fault, write_safetensors


class IPAdapter(nn.Module):
    """An IP-Adapter. `spec` describes it, `metadata` is the file's, `lora` is None for most kinds.

    A new one has fresh, trainable weights; `init_from_unet(adapter.layers, unet)` copies the UNet's own into its
    layers. Inside `with torch.device("meta")` it has no weights. `operations` has the classes of the Linear and
    LayerNorm layers.

    `forward` is `keys_values(encode(...))`, so that a trainer can wrap the adapter for distributed training.
    """

    def __init__(
        self, spec: AdapterSpec, *, operations: Operations = nn, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.metadata = dict(spec_metadata(spec) if metadata is None else metadata)
        self.projector = build_projector(spec, operations=operations)
        self.layers = ImageKeyValueLayers(spec, operations=operations)
        self.lora = None if spec.lora_rank is None else LoraLayers(spec, operations=operations)

    def forward(self, *features: Tensor) -> tuple[KeyValue, ...]:
        return self.keys_values(self.encode(*features))

    def encode(self, *features: Tensor, shortcut_scale: float | None = None) -> Tensor:
        """Image features -> tokens [B, T, D].

        base: image_embeds [B, E]. plus, full: penultimate hidden states [B, L, E]. faceid, portrait: face
        embeddings [B, F] or [B, faces, F]. faceid-plus: face embeddings [B, F] and the face crop's
        penultimate hidden states. `shortcut_scale` counts for faceid-plus v2; None: the projector's own, 1.

        Raises AdapterError when the features are not what this adapter was trained on.
        """
        self.check_features(*features)
        if shortcut_scale is not None and isinstance(self.projector, FaceIDPlusProjection):
            return self.projector(*features, shortcut_scale)
        return cast("Tensor", self.projector(*features))

    def check_features(self, *features: Tensor) -> None:
        """Raises AdapterError when image features, as `encode` takes them, are not what this adapter was trained on."""
        dims = [dim for dim in (self.spec.face_dim, self.spec.image_dim) if dim is not None]
        if len(features) != len(dims):
            raise AdapterError(
                f"This {self.spec.kind} adapter takes {len(dims)} features ({self.spec.feature}), {len(features)} "
                f"were given. Use {self.spec.encoder}."
            )
        for feature, dim in zip(features, dims, strict=True):
            if feature.shape[-1] != dim:
                raise AdapterError(
                    f"The features are {feature.shape[-1]} wide, this {self.spec.kind} adapter takes {dim} "
                    f"({self.spec.feature}). Use {self.spec.encoder}."
                )
        if self.spec.kind == "base" and features[0].ndim != 2:
            raise AdapterError(
                f"The features have shape {tuple(features[0].shape)}, this base adapter takes [B, {dims[0]}]: the "
                "encoder's image_embeds, not its hidden states."
            )
        if self.spec.kind in ("plus", "full") and features[0].ndim != 3:
            raise AdapterError(
                f"The features have shape {tuple(features[0].shape)}, this {self.spec.kind} adapter takes [B, L, "
                f"{dims[0]}]: the encoder's penultimate hidden states, not its image_embeds."
            )

    def negative_tokens(
        self,
        image_features: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Tokens [B, T, D] of the unconditional branch, as in training.

        base, faceid, portrait: the projection of zeros (not zero tokens), B = 1. plus, full and faceid-plus
        need `image_features` [B, L, E]: the encoding of a grey image, whose pixel_values, after the encoder's
        normalisation, are zeros. `device` and `dtype` are those of the zeros; default: the projector's.

        Raises AdapterError when image features are needed and were not given.
        """
        spec = self.spec
        if spec.feature != "image_embeds" and spec.image_dim is not None and image_features is None:
            raise AdapterError(
                f"The negative tokens of a {spec.kind} adapter need the penultimate hidden states [B, L, "
                f"{spec.image_dim}] of a grey image, whose pixel_values are zeros. Encode it with {spec.encoder}, and "
                "pass them."
            )
        like = next(self.projector.parameters())
        if spec.face_dim is not None:
            batch = 1 if image_features is None else image_features.shape[0]
            zeros = torch.zeros(batch, spec.face_dim, device=device or like.device, dtype=dtype or like.dtype)
            return self.encode(zeros) if spec.image_dim is None else self.encode(zeros, cast("Tensor", image_features))
        if image_features is not None:
            return self.encode(image_features)
        return self.encode(
            torch.zeros(1, cast("int", spec.image_dim), device=device or like.device, dtype=dtype or like.dtype)
        )

    def keys_values(self, tokens: Tensor) -> tuple[KeyValue, ...]:
        """Tokens [B, T, D] -> one KeyValue of [B, T, C] tensors per layer, in id order.

        Tokens do not change while sampling: call it once per image, not per step.
        """
        return tuple(KeyValue(to_k(tokens), to_v(tokens)) for to_k, to_v in self.layers.pairs())


def load_adapter(
    path: str | os.PathLike[str],
    *,
    operations: Operations = nn,
    dtype: torch.dtype | None = None,
    shortcut: bool | None = None,
) -> IPAdapter:
    """Load an adapter file of any published layout; frozen, on the CPU, in the file's dtype unless `dtype`
    is given.

    `shortcut` chooses FaceID-plus v2 (True) or v1 (False) and wins over the metadata.

    Raises AdapterError, see `read_checkpoint` and `infer_spec`; also for weights that hold NaN or infinity, and for
    matrices of zeros.
    """
    return adapter_from_checkpoint(read_checkpoint(path), operations=operations, dtype=dtype, shortcut=shortcut)


def adapter_from_checkpoint(
    checkpoint: AdapterCheckpoint,
    *,
    operations: Operations = nn,
    dtype: torch.dtype | None = None,
    shortcut: bool | None = None,
) -> IPAdapter:
    """`load_adapter` for a checkpoint that is already open."""
    spec = with_shortcut(infer_spec(checkpoint), shortcut)  # has checked every shape
    state = {f"projector.{key}": tensor for key, tensor in checkpoint.image_proj.items()}
    for key, tensor in checkpoint.ip_adapter.items():
        state[f"lora.{key}" if "_lora." in key else f"layers.{key}"] = tensor
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    with without_weights():
        adapter = IPAdapter(spec, operations=operations, metadata=checkpoint.metadata)
    adapter.load_state_dict(state, assign=True)
    return adapter.requires_grad_(False).eval()


def export_state(adapter: IPAdapter) -> dict[str, Tensor]:
    """The adapter under its published flat keys: `image_proj.*` and `ip_adapter.*` (LoRA included)."""
    state: dict[str, Tensor] = {f"image_proj.{k}": v for k, v in adapter.projector.state_dict().items()}
    for part in (adapter.layers, adapter.lora):
        if part is not None:
            state.update({f"ip_adapter.{k}": v for k, v in part.state_dict().items()})
    return state


def state_to_save(path: Path, adapter: IPAdapter) -> dict[str, Tensor]:
    """`export_state` on the CPU, contiguous, for the file `path`.

    Raises AdapterError for weights that `load_adapter` would refuse.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in export_state(adapter).items()}
    for key, tensor in state.items():
        if fault := value_fault(key, tensor):
            raise AdapterError(f"{path}: not saved, {fault[0]}. The training diverged, or never began.")
    return state


def save_adapter(path: str | os.PathLike[str], adapter: IPAdapter, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file that every IP-Adapter host loads. It appears whole or not at all.

    The spec goes into the header (`spec_metadata`); `metadata` adds provenance and wins on equal keys, except on those
    that describe the tensors.

    Raises AdapterError for a path that is not .safetensors or weights that `load_adapter` would refuse; OSError or
    SafetensorError when the disk refuses (no half file stays).
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise AdapterError(f"{target}: adapters are saved as .safetensors. Change the suffix {target.suffix!r}.")
    more = {key: value for key, value in (metadata or {}).items() if key not in OF_THE_TENSORS}
    header = {**spec_metadata(_current_spec(adapter)), **more}
    write_safetensors(target, state_to_save(target, adapter), header)


def _current_spec(adapter: IPAdapter) -> AdapterSpec:
    """The spec with the shortcut that the projector really uses."""
    if isinstance(adapter.projector, FaceIDPlusProjection):
        return with_shortcut(adapter.spec, adapter.projector.shortcut)
    return adapter.spec
