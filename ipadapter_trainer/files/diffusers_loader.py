"""An adapter file loaded by diffusers, so that what its users get can be compared with the original.

The loader needs a UNet. This one has the adapter's shapes and lies on the meta device; only the adapter's projector
and layers get weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import AdapterSpec, KeyValue
from ipadapter_core.empty import without_weights
from ipadapter_core.layers import attention_ids

_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
}


class _UNet(UNet2DConditionModel):
    """A UNet without weights that an adapter can be loaded into. It stores the LoRA instead of applying it."""

    adapter_lora: dict[str, Tensor]
    _processors: dict[str, Any] | None = None

    @property
    def attn_processors(self) -> dict[str, Any]:
        # The loader asks for them at every layer, and diffusers walks through all modules each time.
        if self._processors is None:
            self._processors = super().attn_processors
        return self._processors

    def set_attn_processor(self, processor: Any) -> None:
        super().set_attn_processor(processor)
        self._processors = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] -- wrapped
        return self  # the loader's last step; meta tensors cannot be moved

    def remove_adapter(self, processors: Mapping[str, Any]) -> None:
        """Put back the processors from before an adapter was loaded, and let go of its weights."""
        self.encoder_hid_proj = self._processors = None
        self.adapter_lora = {}
        self.set_attn_processor(dict(processors))

    def _load_ip_adapter_loras(self, state_dicts: Any) -> dict[int, dict[str, Tensor]]:
        self.adapter_lora = super()._load_ip_adapter_loras(state_dicts).get(0, {})
        return {}


class _Pipeline(IPAdapterMixin):
    """The part of a pipeline that has `load_ip_adapter`."""

    unet_name = "unet"

    def __init__(self, unet: _UNet) -> None:
        self.unet = unet


@dataclass(frozen=True, eq=False)
class DiffusersAdapter:
    """A file loaded by diffusers; its outputs are those of an `IPAdapter`, in float32."""

    spec: AdapterSpec
    projection: Any  # the UNet's `encoder_hid_proj`
    processors: Mapping[str, Any]  # the UNet's attention processors, in diffusers' order
    lora_weights: Mapping[str, Tensor]

    @torch.no_grad()
    def encode(self, *features: Tensor) -> Tensor:
        """Image features as `IPAdapter.encode` takes them -> tokens [B, T, D]."""
        first = features[0]
        if self.spec.kind == "faceid-plus":
            resampler = self.projection.image_projection_layers[0]
            resampler.clip_embeds = features[1].unsqueeze(1)
            resampler.shortcut = bool(self.spec.shortcut)
        elif self.spec.unnormalised:
            first = first.unsqueeze(1)  # a resampler reads a sequence, here of one
        return self.projection([first.unsqueeze(1)])[0].flatten(1, 2)

    @torch.no_grad()
    def keys_values(self, tokens: Tensor) -> tuple[KeyValue, ...]:
        """Tokens [B, T, D] -> keys and values [B, T, C] per layer, in id order."""
        ids = attention_ids(self.processors)
        names = sorted((name for name, id in ids.items() if id % 2), key=ids.__getitem__)  # cross-attention has odd ids
        processors = [self.processors[name] for name in names]
        weights = ((p.to_k_ip[0].weight.float(), p.to_v_ip[0].weight.float()) for p in processors)
        return tuple(KeyValue(F.linear(tokens, key), F.linear(tokens, value)) for key, value in weights)

    def lora(self, id: int, name: str, side: str) -> Tensor | None:
        """The weight of `name` ("to_q_lora", ...), `side` "down" or "up", for layer `id`."""
        return self.lora_weights.get(f"unet.{list(self.processors)[id]}.{name}.{side}.weight")


def load_with_diffusers(file: Path, spec: AdapterSpec) -> DiffusersAdapter:
    """Load a file as `pipeline.load_ip_adapter(folder, "", file.name)` does.

    Raises whatever diffusers raises, and RuntimeError when it leaves a tensor without weights.
    """
    unet = _unet_without_weights(spec.layer_dims, spec.cross_attention_dim)
    empty = dict(unet.attn_processors)
    try:
        _Pipeline(unet).load_ip_adapter(
            str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None, local_files_only=True
        )
        projection: Any = unet.encoder_hid_proj
        processors = {name: unet.attn_processors[name] for name in empty}  # without those of a resampler
        lora_weights = unet.adapter_lora
    finally:
        unet.remove_adapter(empty)
    left = [name for name, parameter in projection.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors of the projector stayed empty, the first is {left[0]}")
    projection.float()
    return DiffusersAdapter(spec, projection, processors, lora_weights)


@lru_cache(maxsize=2)
def _unet_without_weights(layer_dims: tuple[int, ...], cross_attention_dim: int) -> _UNet:
    """A UNet with these cross-attention layers. Kept, because making it takes longer than loading an adapter."""
    with without_weights():
        return _UNet(**_unet_config(layer_dims, cross_attention_dim) or {})


def unsupported(spec: AdapterSpec) -> str | None:
    """Why diffusers' loader cannot take this adapter, or None. It hard-codes numbers that files may vary."""
    fixed: list[tuple[str, int | None, int | None]] = []
    if spec.kind in ("base", "faceid-plus"):
        fixed.append(("tokens", spec.num_tokens, 4))
    if spec.depth is not None:
        fixed += [("resampler layers", spec.depth, 4), ("channels per head", spec.dim_head, 64)]
    if spec.kind == "full":
        fixed.append(("channels inside the MLP", spec.hidden_dim, spec.image_dim))
    if spec.kind == "faceid-plus":
        fixed.append(("channels inside the face MLP", spec.hidden_dim, 2 * (spec.face_dim or 0)))
    for what, found, wanted in fixed:
        if found != wanted:
            return f"its loader takes {wanted} {what}, this adapter has {found}"
    if spec.kind in ("faceid", "portrait") and not spec.unnormalised and (spec.hidden_dim or 0) % (spec.face_dim or 1):
        return f"its loader takes an MLP of a multiple of {spec.face_dim}, this one is {spec.hidden_dim} wide"
    return None if unet_config(spec) else f"no known UNet has {len(spec.layer_dims)} layers of these widths"


def unet_config(spec: AdapterSpec) -> dict[str, Any] | None:
    """The config of a UNet with the adapter's cross-attention layers in the layout of SD1.5 or SDXL, or None."""
    return _unet_config(spec.layer_dims, spec.cross_attention_dim)


def _unet_config(widths: tuple[int, ...], cross_attention_dim: int) -> dict[str, Any] | None:
    common = {"cross_attention_dim": cross_attention_dim, "norm_num_groups": 1, "attention_head_dim": 1}
    if len(widths) == 16:
        a, b, c, d = widths[0], widths[2], widths[4], widths[15]
        if widths == (a,) * 2 + (b,) * 2 + (c,) * 5 + (b,) * 3 + (a,) * 3 + (d,):
            return common | {"block_out_channels": (a, b, c, d)}
    if len(widths) == 70:
        a, b = widths[0], widths[4]
        if widths == (a,) * 4 + (b,) * 50 + (a,) * 6 + (b,) * 10:
            return common | _SDXL_BLOCKS | {"block_out_channels": (a, a, b)}
    return None
