"""The LoRA that FaceID files carry for every attention layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .operations import Operations

LORA_PARTS = ("to_q", "to_k", "to_v", "to_out")


class LoraLinear(nn.Module):
    """The low-rank update up(down(x)) of one Linear. [..., in] -> [..., out]."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        rank: int,
        *,
        operations: Operations = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = operations.Linear(in_width, rank, bias=False, device=device, dtype=dtype)
        self.up = operations.Linear(rank, out_width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class LoraLayers(nn.Module):
    """LoRA on to_q, to_k, to_v and to_out of attn1 and attn2, by layer id; keys such as
    `0.to_q_lora.down.weight`.
    """

    def __init__(
        self,
        layer_dims: Sequence[int],
        cross_attention_dim: int,
        rank: int,
        *,
        operations: Operations = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for id in range(2 * len(layer_dims)):
            width = layer_dims[id // 2]
            layer = nn.Module()
            for part in LORA_PARTS:
                source = cross_attention_dim if id % 2 and part in ("to_k", "to_v") else width
                linear = LoraLinear(source, width, rank, operations=operations, device=device, dtype=dtype)
                layer.add_module(f"{part}_lora", linear)
            self.add_module(str(id), layer)

    def part(self, id: int, name: str) -> nn.Module:
        """The update of `name` ("to_q", "to_k", "to_v" or "to_out") in layer `id`."""
        return self.get_submodule(f"{id}.{name}_lora")

    @torch.no_grad()
    def reset(self) -> None:
        """Start from an update of zero: `down` normal with deviation 1/rank, `up` zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("up.weight"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1 / parameter.shape[0])
