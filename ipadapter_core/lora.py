"""The LoRA that FaceID files have for every attention layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .operations import Operations
from .spec import AdapterSpec

LORA_PARTS = ("to_q", "to_k", "to_v", "to_out")


class LoraLinear(nn.Module):
    """The low-rank update up(down(x)) of one Linear. [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, operations: Operations = nn) -> None:
        super().__init__()
        self.down = operations.Linear(in_features, rank, bias=False)
        self.up = operations.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class LoraLayers(nn.Module):
    """LoRA on to_q, to_k, to_v and to_out of attn1 and attn2, by layer id; keys such as `0.to_q_lora.down.weight`.

    It starts as an update of zero: `down` normal with deviation 1/rank, `up` zero.
    """

    def __init__(self, spec: AdapterSpec, *, operations: Operations = nn) -> None:
        super().__init__()
        rank = cast("int", spec.lora_rank)
        for id in range(2 * len(spec.layer_dims)):
            dim = spec.layer_dims[id // 2]
            layer = nn.Module()
            for part in LORA_PARTS:
                in_features = spec.cross_attention_dim if id % 2 and part in ("to_k", "to_v") else dim
                layer.add_module(f"{part}_lora", LoraLinear(in_features, dim, rank, operations=operations))
            self.add_module(str(id), layer)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                break  # the file's weights will be assigned
            if name.endswith("up.weight"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1 / rank)

    def part(self, id: int, name: str) -> nn.Module:
        """The update of `name` ("to_q", "to_k", "to_v" or "to_out") in layer `id`."""
        return self.get_submodule(f"{id}.{name}_lora")
