"""The weight types of ComfyUI_IPAdapter_plus: one weight per transformer of the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# Names from other versions of ComfyUI_IPAdapter_plus, and from its simple node.
WEIGHT_TYPE_ALIASES: Mapping[str, WeightType] = {
    "original": "linear",
    "standard": "linear",
    "prompt is more important": "ease out",
    "style transfer (SDXL)": "style transfer",
    "style transfer (SDXL only)": "style transfer",
    "composition (SDXL)": "composition",
    "style transfer and composition": "style and composition",
}

_WEAK = 0.2
_EASE_FLOOR = 0.05
_LEAK = 0.1  # how much of the boost the layers without a role get in "composition precise"


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """The weight of one transformer, on both branches of classifier-free guidance.

    Usually positive tokens act in the positive branch and negative tokens in the negative one, both with
    `weight`. When `swapped`, the positive tokens act in the NEGATIVE branch with `weight` and the positive
    branch gets nothing: that pushes the image away from what this layer would add.
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
class WeightLayout:
    """The number of transformers before, in and after the middle block of a UNet."""

    inputs: int
    middle: int
    outputs: int

    @property
    def transformers(self) -> int:
        return self.inputs + self.middle + self.outputs

    def __str__(self) -> str:
        return f"{self.inputs}, {self.middle} and {self.outputs}"


WEIGHT_LAYOUTS: Mapping[str, WeightLayout] = {
    "sd15": WeightLayout(6, 1, 9),
    "sd2": WeightLayout(6, 1, 9),
    "sdxl": WeightLayout(4, 1, 6),
}


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which transformers carry style and composition, by their index in execution order."""

    style: frozenset[int]
    composition: dict[int, float]  # index -> share of the composition weight
    leak: frozenset[int]  # neither: they get 0.1 of the boost in "composition precise"


_ROLES = {
    WEIGHT_LAYOUTS["sd15"]: _Roles(frozenset({0, 1, 2, 3, *range(9, 16)}), {4: 0.25, 5: 1.0}, frozenset({6, 7, 8})),
    WEIGHT_LAYOUTS["sdxl"]: _Roles(frozenset({6}), {3: 1.0}, frozenset({0, 1, 2, 4, 5, 7, 8, 9, 10})),
}
# Formulas for any UNet; all other weight types need to know its style and composition transformers.
_FORMULAS = frozenset(WEIGHT_TYPES[: WEIGHT_TYPES.index("style transfer")])
_STAGES = {
    **{"input_blocks": 0, "middle_block": 1, "output_blocks": 2},  # ComfyUI
    **{"down_blocks": 0, "mid_block": 1, "up_blocks": 2},  # diffusers
}


def weight_layout(sites: Sequence[Site]) -> WeightLayout:
    """The layout of a model in ComfyUI or diffusers, pruned and small ones included.

    Raises AdapterError for a site outside the stages of a UNet.
    """
    stages: dict[int, int] = {}
    for site in sites:
        name = site.name.split(".", maxsplit=1)[0]
        if name not in _STAGES:
            raise AdapterError(f"The layer {site.name!r} is in none of {', '.join(_STAGES)}. Only UNets are supported.")
        stages[site.transformer_index] = _STAGES[name]
    return WeightLayout(*(list(stages.values()).count(stage) for stage in range(3)))


def parse_weight_type(name: str) -> WeightType:
    """The weight type of this name, which may be one of `WEIGHT_TYPE_ALIASES`.

    Raises AdapterError for an unknown name.
    """
    if name in WEIGHT_TYPES:
        return name
    if name in WEIGHT_TYPE_ALIASES:
        return WEIGHT_TYPE_ALIASES[name]
    if name == "channel penalty":
        raise AdapterError(f"Weight type {name!r} is now 'linear' with embeds scaling 'K+mean(V) w/ C penalty'.")
    raise AdapterError(f"Unknown weight type {name!r}. Use one of: {', '.join(WEIGHT_TYPES)}.")


def layer_weights(
    weight_type: str,
    layout: WeightLayout | str,
    weight: float = 1.0,
    *,
    weight_composition: float = 1.0,
    boost: float | None = None,
) -> tuple[LayerWeight, ...]:
    """One LayerWeight per transformer, indexed by `Site.transformer_index`.

    `layout` is that of the UNet (see `weight_layout`), or one of "sd15", "sd2" and "sdxl". `weight_composition`
    counts for the two "... style and composition" types; `boost` is the strength of the swapped layers of the
    "precise" types (None: `weight`).

    Raises AdapterError for an unknown weight type or family, and for a weight type that is not defined for the
    layout: style and composition layers are known for SD1.5, SD2 and SDXL only.
    """
    if isinstance(layout, str):
        if layout not in WEIGHT_LAYOUTS:
            raise AdapterError(f"Weight types are defined for {', '.join(WEIGHT_LAYOUTS)}, not for {layout!r}.")
        layout = WEIGHT_LAYOUTS[layout]
    weight_type = parse_weight_type(weight_type)
    if weight_type in _FORMULAS:
        if weight_type.endswith("middle") and not layout.middle:
            raise AdapterError(
                f"Weight type {weight_type!r} is for UNets with attention in the middle block; this one has {layout} "
                "transformers before, in and after it. Use 'linear'."
            )
        factors = [_factor(weight_type, layout, index) for index in range(layout.transformers)]
        return tuple(LayerWeight(weight * factor) for factor in factors)
    roles = _ROLES.get(layout)
    if roles is None:
        raise AdapterError(
            f"Weight type {weight_type!r} is for UNets with {WEIGHT_LAYOUTS['sd15']} (SD1.5) or "
            f"{WEIGHT_LAYOUTS['sdxl']} (SDXL) transformers before, in and after the middle block; this one has "
            f"{layout}. Use 'linear'."
        )
    strength = weight if boost is None else boost
    return tuple(
        _swapped(weight_type, roles, index, strength)
        or LayerWeight(_plain(weight_type, roles, index, weight, weight_composition))
        for index in range(layout.transformers)
    )


def _plain(weight_type: WeightType, roles: _Roles, index: int, weight: float, weight_composition: float) -> float:
    """The weight of a layer whose branches are not swapped."""
    style = weight if index in roles.style else 0.0
    share = roles.composition.get(index, 0.0)
    if weight_type in ("style transfer", "style transfer precise"):
        return style
    if weight_type in ("composition", "composition precise"):
        return weight * share
    if weight_type == "strong style transfer":
        return 0.0 if share else weight
    if weight_type == "style and composition":
        return style or weight_composition * share
    return weight_composition if share else weight  # strong style and composition


def _swapped(weight_type: WeightType, roles: _Roles, index: int, boost: float) -> LayerWeight | None:
    """The swapped layers of the "precise" types: composition layers for style, all others for composition."""
    share = roles.composition.get(index)
    if weight_type == "style transfer precise" and share is not None:
        return LayerWeight(boost * share, swapped=True)
    if weight_type == "composition precise" and share is None:
        return LayerWeight(boost * (_LEAK if index in roles.leak else 1.0), swapped=True)
    return None


def _factor(weight_type: WeightType, layout: WeightLayout, index: int) -> float:
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
    before, after = index < layout.inputs, index >= layout.inputs + layout.middle
    weak = {
        "weak input": before,
        "weak output": after,
        "weak middle": not before and not after,
        "strong middle": before or after,
    }
    return _WEAK if weak.get(weight_type, False) else 1.0
