"""The ways of using an adapter that are measured, for each pack. Import it after `start_comfyui`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from overhead_models import CPU, Adapter, OldNode, Ours, new_adapter, old_names, peer_node
from torch import Tensor

Contender = Ours | OldNode
IMAGES = 64
ONE, THREE, MASK, REGIONS = "one adapter", "three adapters", "one adapter, mask", "four regions"
FACE, FRAMES = "face prompt", f"{IMAGES} frames"


@dataclass(frozen=True, eq=False)
class Case:
    """`builders` make the patched MODEL of each pack from the base MODEL; `images` latents are sampled at once."""

    name: str
    builders: Mapping[str, Callable[[Any], Any]]
    images: int = 1

    def models(self, base: Any) -> dict[str, Any]:
        """The base MODEL and those of the packs."""
        return {"base": base, **{name: build(base) for name, build in self.builders.items()}}


@dataclass(frozen=True, eq=False)
class Packs:
    """This repository's pack, and the peer's package or None. `old_names`: ours under the peer's names."""

    ours: SimpleNamespace
    peer: ModuleType | None
    old_names: bool = False

    def contenders(self, adapter: Adapter) -> dict[str, Contender]:
        """What applies this adapter, of each pack."""
        ours = old_names if self.old_names else Ours
        contenders: dict[str, Contender] = {"ours": ours(self.ours, adapter)}
        if self.peer:
            contenders["peer"] = peer_node(self.peer, self.ours, adapter)
        return contenders


def cases(
    packs: Packs, model: Any, family: str, dtype: torch.dtype, names: Sequence[str], device: torch.device = CPU
) -> Iterator[Case]:
    """The cases of these names with random adapters of `dtype`, whose weights are made on `device`. The peer's face
    nodes need insightface and its models, so a face prompt has no peer, and under the old names there is none.
    """

    def contenders(**options: Any) -> dict[str, Contender]:
        adapter = new_adapter(packs.ours, model, family, dtype, device=device, **options)
        return {"ours": Ours(packs.ours, adapter)} if adapter.face is not None else packs.contenders(adapter)

    plus = contenders() if set(names) - {FACE, FRAMES} else {}
    for name in names:
        if name == FACE and packs.old_names:
            continue
        images = IMAGES if name == FRAMES else 1
        of_case = contenders(face=True) if name == FACE else contenders(images=images) if name == FRAMES else plus
        yield Case(name, {pack: functools.partial(_APPLY[name], each) for pack, each in of_case.items()}, images)


def _quarters(side: int = 64) -> list[Tensor]:
    """A mask [1, side, side] for each quarter of an image."""
    half = side // 2
    masks = torch.zeros(4, 1, side, side)
    for mask, (top, left) in zip(masks, ((0, 0), (0, half), (half, 0), (half, half)), strict=True):
        mask[:, top : top + half, left : left + half] = 1.0
    return list(masks)


_MASKS = _quarters()
_APPLY: Mapping[str, Callable[[Contender, Any], Any]] = {
    ONE: lambda each, base: each.apply(base),
    THREE: lambda each, base: each.apply(each.apply(each.apply(base))),
    MASK: lambda each, base: each.apply(base, mask=_MASKS[0]),
    REGIONS: lambda each, base: each.apply_regions(base, _MASKS),
    FACE: lambda each, base: each.apply(base),
    FRAMES: lambda each, base: each.apply(base),
}
