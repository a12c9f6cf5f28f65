"""The weight types of ComfyUI_IPAdapter_plus: one weight per transformer of the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import AdapterError
from .layers import Site

WeightType = Literal[
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak output",
    "weak middle",
    "strong middle",
    "style transfer",
    "composition",
    "strong style transfer",
    "style and composition",
    "style transfer precise",
    "composition precise",
    "strong style and composition",
]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)

_WEAK = 0.2
_EASE_FLOOR = 0.05
_LEAK = 0.1  # how much of the boost the layers without a role get in "composition precise"


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """The weight of one transformer, on both branches of classifier-free guidance.

    Usually positive tokens act in the positive branch and negative tokens in the negative one, both with
    `weight`. When `swapped`, the positive tokens act in the NEGATIVE branch with `weight` and the positive
    branch gets nothing: that pushes the picture away from what this layer would add.
    """

    weight: float
    swapped: bool = False

    @property
    def positive(self) -> float:
        """Weight of the positive tokens in the positive branch."""
        return 0.0 if self.swapped else self.weight

    @property
    def negative(self) -> float:
        """Weight of the negative tokens in the negative branch."""
        return 0.0 if self.swapped else self.weight

    @property
    def positive_into_negative(self) -> float:
        """Weight of the positive tokens in the negative branch."""
        return self.weight if self.swapped else 0.0


@dataclass(frozen=True, slots=True)
class _UNetLayout:
    """Transformers in execution order (input, middle, output), and which of them carry style and
    composition.
    """

    transformers: int
    middle: int
    style: frozenset[int]
    composition: dict[int, float]  # index -> share of the composition weight
    leak: frozenset[int]  # neither: they get 0.1 of the boost in "composition precise"


_SD15 = _UNetLayout(16, 6, frozenset({0, 1, 2, 3, *range(9, 16)}), {4: 0.25, 5: 1.0}, frozenset({6, 7, 8}))
_SDXL = _UNetLayout(11, 4, frozenset({6}), {3: 1.0}, frozenset({0, 1, 2, 4, 5, 7, 8, 9, 10}))
_LAYOUTS = {"sd15": _SD15, "sd2": _SD15, "sdxl": _SDXL}


def weight_layout(sites: Sequence[Site]) -> str:
    """ "sd15" or "sdxl": which weight table fits a model, by its number of transformers (16 or 11).

    It also serves small models of the same shape. Raises AdapterError for any other number.
    """
    count = len({site.transformer_index for site in sites})
    for name in ("sd15", "sdxl"):
        if _LAYOUTS[name].transformers == count:
            return name
    raise AdapterError(f"Weight types know UNets of 16 (SD1.5) or 11 (SDXL) transformers; this one has {count}.")


def layer_weights(
    weight_type: str,
    family: str,
    weight: float = 1.0,
    *,
    weight_composition: float = 1.0,
    boost: float | None = None,
) -> tuple[LayerWeight, ...]:
    """One LayerWeight per transformer, indexed by `Site.transformer_index`.

    `family` is "sd15", "sd2" or "sdxl" (see `weight_layout`). `weight_composition` counts for the two "...
    style and composition" types; `boost` is the strength of the swapped layers of the "precise" types
    (None: `weight`).

    Raises AdapterError for an unknown weight type or family.
    """
    layout = _LAYOUTS.get(family)
    if layout is None:
        raise AdapterError(f"Weight types are defined for {', '.join(_LAYOUTS)}, not for {family!r}.")
    if weight_type not in WEIGHT_TYPES:
        raise AdapterError(f"Unknown weight type {weight_type!r}. Use one of: {', '.join(WEIGHT_TYPES)}.")
    strength = weight if boost is None else boost
    return tuple(
        _swapped(weight_type, layout, index, weight, strength)
        or LayerWeight(_plain(weight_type, layout, index, weight, weight_composition))
        for index in range(layout.transformers)
    )


def _plain(weight_type: str, layout: _UNetLayout, index: int, weight: float, weight_composition: float) -> float:
    """The weight of a layer whose branches are not swapped."""
    style = weight if index in layout.style else 0.0
    share = layout.composition.get(index, 0.0)
    if weight_type in ("style transfer", "style transfer precise"):
        return style
    if weight_type in ("composition", "composition precise"):
        return weight * share
    if weight_type == "strong style transfer":
        return 0.0 if share else weight
    if weight_type == "style and composition":
        return style or weight_composition * share
    if weight_type == "strong style and composition":
        return weight_composition if share else weight
    return weight * _factor(weight_type, layout, index)


def _swapped(weight_type: str, layout: _UNetLayout, index: int, weight: float, boost: float) -> LayerWeight | None:
    """The swapped layers of the "precise" types: composition layers for style, all others for composition."""
    share = layout.composition.get(index)
    if weight_type == "style transfer precise" and share is not None:
        return LayerWeight(boost * share, swapped=True)
    if weight_type == "composition precise" and share is None:
        return LayerWeight(boost * (_LEAK if index in layout.leak else 1.0), swapped=True)
    return None


def _factor(weight_type: str, layout: _UNetLayout, index: int) -> float:
    ramp = index / layout.transformers
    from_centre = abs(2 * ramp - 1)
    eased = {
        "ease in": 1 - ramp,
        "ease out": ramp,
        "ease in-out": 1 - from_centre,
        "reverse in-out": from_centre,
    }
    if weight_type in eased:
        return _EASE_FLOOR + (1 - _EASE_FLOOR) * eased[weight_type]
    weak = {
        "weak input": index < layout.middle,
        "weak output": index > layout.middle,
        "weak middle": index == layout.middle,
        "strong middle": index != layout.middle,
    }
    return _WEAK if weak.get(weight_type, False) else 1.0
