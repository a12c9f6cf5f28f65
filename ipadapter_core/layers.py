"""Which attention layer has which id, and the image keys and values of each.

Published files number the layers in the order of diffusers' `unet.attn_processors`: down blocks, up blocks, then the
middle block. Self-attention has the even ids, cross-attention the odd ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .operations import Operations
from .spec import AdapterSpec

_STAGES = ("down_blocks", "up_blocks", "mid_block")  # the order of ids; execution goes down, mid, up
_MOTION = ("motion_modules", "temporal")
_VIDEO = (
    "The connected model is a video model (Stable Video Diffusion), whose conditioning is an image already. "
    "IP-Adapters fit SD1.5, SD2 and SDXL models; for a video use one of these with AnimateDiff."
)


@dataclass(frozen=True, slots=True)
class Site:
    """One cross-attention layer of a loaded model.

    `id` is its odd number in adapter files, `name` that of the module in the model, `dim` the channels of its queries
    and keys, `cross_attention_dim` those of the text. `transformer_index` counts the transformers in execution order
    (input, middle, output); weight types give one weight to each. `block` is ComfyUI's patch key, such as
    ("input", 1, 0); None for diffusers. `heads`: the number of attention heads.
    """

    id: int
    name: str
    dim: int
    cross_attention_dim: int
    transformer_index: int
    block: tuple[str, int, int] | None = None
    heads: int = 1


def attention_ids(names: Iterable[str]) -> dict[str, int]:
    """Attention module or processor names, in any order -> their ids, in id order (attn1 even, attn2 odd). Motion
    modules have no id.

    Raises AdapterError for a name outside down_blocks, up_blocks and mid_block.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if not any(word in name for word in _MOTION):
            groups.setdefault(re.split(r"\.attn[12]\b", name)[0], []).append(name)
    ids: dict[str, int] = {}
    for index, group in enumerate(sorted(groups, key=_id_order)):
        ids.update({name: 2 * index + (".attn2" in name) for name in sorted(groups[group])})
    return ids


def _id_order(name: str) -> tuple[int, list[int]]:
    for stage, prefix in enumerate(_STAGES):
        if name.startswith(prefix):
            return stage, [int(number) for number in re.findall(r"\d+", name)]
    raise AdapterError(f"The attention layer {name!r} is in none of {', '.join(_STAGES)}. Only UNets are supported.")


def diffusers_sites(unet: nn.Module) -> tuple[Site, ...]:
    """Cross-attention sites of a diffusers UNet2DConditionModel, in id order; motion modules are left out.

    Raises AdapterError when the model has no cross-attention layers, and for Stable Video Diffusion.
    """
    modules = named_modules(unet)
    processors = cast("Mapping[str, Any]", getattr(unet, "attn_processors", {}))
    if any(".temporal_transformer_blocks." in name for name in processors):
        raise AdapterError(_VIDEO)
    ids = {name.removesuffix(".processor"): id for name, id in attention_ids(processors).items() if id % 2}
    if not ids:
        raise AdapterError(f"{type(unet).__name__} has no cross-attention layers. Pass a UNet2DConditionModel.")
    transformers = sorted({_transformer(name) for name in ids}, key=_execution_order)
    return tuple(_site(modules[name], id, name, transformers.index(_transformer(name))) for name, id in ids.items())


def _site(
    attention: Any, id: int, name: str, transformer_index: int, block: tuple[str, int, int] | None = None
) -> Site:
    dim, cross_attention_dim = int(attention.to_k.out_features), int(attention.to_k.in_features)
    return Site(id, name, dim, cross_attention_dim, transformer_index, block, int(attention.heads))


def named_modules(model: nn.Module) -> dict[str, Any]:
    """`model.named_modules()` as a dict of duck-typed modules, those of a torch.compile wrapper without its prefix."""
    return dict(cast("Iterator[tuple[str, Any]]", unwrap(model).named_modules()))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that torch.compile returns, or the model itself."""
    return cast("nn.Module", getattr(model, "_orig_mod", model))


def _transformer(name: str) -> str:
    return name.split(".transformer_blocks.", maxsplit=1)[0]


def _execution_order(name: str) -> tuple[int, list[int]]:
    stage, numbers = _id_order(name)
    return (0, 2, 1)[stage], numbers


def cross_attention_sites(diffusion_model: Any) -> tuple[Site, ...]:
    """Cross-attention sites of ComfyUI's UNetModel, in id order (input, output, middle), found by walking its module
    tree.

    A transformer is a direct child of a block that has `transformer_blocks` whose items have `attn2`;
    motion modules nest theirs deeper and are left out.

    Raises AdapterError when the model is no UNet or has no cross-attention layers, and for Stable Video Diffusion.
    """
    if not all(hasattr(diffusion_model, part) for part in ("input_blocks", "middle_block", "output_blocks")):
        raise AdapterError(
            f"{type(diffusion_model).__name__} is not a UNet (it has no input_blocks, middle_block and "
            "output_blocks). IP-Adapters fit SD1.5, SD2 and SDXL models."
        )
    blocks = {("input", i): (f"input_blocks.{i}", block) for i, block in enumerate(diffusion_model.input_blocks)}
    blocks["middle", 0] = "middle_block", diffusion_model.middle_block
    blocks |= {("output", i): (f"output_blocks.{i}", block) for i, block in enumerate(diffusion_model.output_blocks)}
    layers = {place: _cross_attentions(*named) for place, named in blocks.items()}
    executed = [place for place, found in layers.items() if found]  # the dict is in execution order
    sites: list[Site] = []
    for place in sorted(executed, key=lambda place: (place[0] == "middle", place)):
        for i, (name, attention) in enumerate(layers[place]):
            sites.append(_site(attention, 2 * len(sites) + 1, name, executed.index(place), (*place, i)))
    if not sites:
        raise AdapterError(f"{type(diffusion_model).__name__} has no cross-attention layers. Use an SD or SDXL model.")
    return tuple(sites)


def _cross_attentions(block_name: str, block: Any) -> list[tuple[str, Any]]:
    """The cross-attention modules of a block of ComfyUI's UNet, with their names in the module tree."""
    children = () if block is None else block.named_children()  # some pruned UNets have no middle block
    transformers = [(name, module) for name, module in children if hasattr(module, "transformer_blocks")]
    # The layers over time of Stable Video Diffusion are called with the keys of those over the image.
    if any(hasattr(module, "time_stack") for _, module in transformers):
        raise AdapterError(_VIDEO)
    return [
        (f"{block_name}.{name}.transformer_blocks.{i}.attn2", inner.attn2)
        for name, module in transformers
        for i, inner in enumerate(module.transformer_blocks)
        if getattr(inner, "attn2", None) is not None
    ]


class ImageKeyValueLayers(nn.Module):
    """`to_k_ip` and `to_v_ip` of every cross-attention layer; its state dict is the file's `ip_adapter` part."""

    def __init__(self, spec: AdapterSpec, *, operations: Operations = nn) -> None:
        super().__init__()
        self.layer_ids = spec.layer_ids
        for id, dim in zip(spec.layer_ids, spec.layer_dims, strict=True):
            layer = nn.Module()
            for name in ("to_k_ip", "to_v_ip"):
                layer.add_module(name, operations.Linear(spec.cross_attention_dim, dim, bias=False))
            self.add_module(str(id), layer)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(to_k_ip, to_v_ip) of each layer, in id order."""
        for id in self.layer_ids:
            layer = self.get_submodule(str(id))
            yield layer.get_submodule("to_k_ip"), layer.get_submodule("to_v_ip")


@torch.no_grad()
def init_from_unet(layers: ImageKeyValueLayers, unet: nn.Module) -> None:
    """Copy the text `to_k` and `to_v` of a diffusers UNet into the image layers (paper section 4.1.2).

    Raises AdapterError when the UNet has another number of layers or layers of other dims.
    """
    sites = diffusers_sites(unet)
    if len(sites) != len(layers.layer_ids):
        raise AdapterError(
            f"The adapter has {len(layers.layer_ids)} layers, the UNet {len(sites)}. Build the adapter for this UNet."
        )
    modules = named_modules(unet)
    for site, pair in zip(sites, layers.pairs(), strict=True):
        attention = modules[site.name]
        for target, source in zip(pair, (attention.to_k, attention.to_v), strict=True):
            weight = cast("Tensor", target.weight)
            if weight.shape != source.weight.shape:
                raise AdapterError(
                    f"Layer {site.id} ({site.name}): the adapter's weight is {tuple(weight.shape)}, the UNet's "
                    f"{tuple(source.weight.shape)}. Build the adapter for this UNet."
                )
            weight.copy_(source.weight)
