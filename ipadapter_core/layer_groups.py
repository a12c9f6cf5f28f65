"""A factor for each transformer of the UNet, on top of a weight type: by named groups, or one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import AdapterError
from .spec import FAMILY_NAMES
from .weight_types import WEIGHT_LAYOUTS, LayerWeight, WeightLayout

# Transformers in execution order. Best known for SDXL: composition and style from InstantStyle (arXiv 2404.02733),
# content from B-LoRA (arXiv 2403.14572).
LAYER_GROUPS: Mapping[str, Mapping[str, range]] = {
    "early": {"sd15": range(4), "sdxl": range(3)},
    "composition": {"sd15": range(4, 6), "sdxl": range(3, 4)},
    "middle": {"sd15": range(6, 7), "sdxl": range(4, 5)},
    "content": {"sd15": range(7, 9), "sdxl": range(5, 6)},
    "style": {"sd15": range(9, 13), "sdxl": range(6, 7)},
    "detail": {"sd15": range(13, 16), "sdxl": range(7, 11)},
}
_FAMILIES = ("sd15", "sdxl")
MOST_FACTOR = 10.0  # that a text may name


@dataclass(frozen=True)
class LayerFactors:
    """One factor for each transformer of a UNet in the layout of `family`, "sd15" (SD2 too) or "sdxl"."""

    family: str
    factors: tuple[float, ...]

    def scale(self, weights: Sequence[LayerWeight], layout: WeightLayout) -> tuple[LayerWeight, ...]:
        """The weights of a model of this layout, each times its factor.

        Raises AdapterError when the layout is that of another family.
        """
        own = WEIGHT_LAYOUTS[self.family]
        if layout != own:
            family = family_of_layout(layout)
            use = f"Choose {FAMILY_NAMES[family]} there" if family else "Use a weight type alone"
            raise AdapterError(
                f"The layer weights are for {FAMILY_NAMES[self.family]}, with {own} transformers before, in and after "
                f"the middle block; the connected model has {layout}. {use}."
            )
        return tuple(
            replace(layer, weight=layer.weight * factor) for layer, factor in zip(weights, self.factors, strict=True)
        )


def group_factors(family: str, groups: Mapping[str, float]) -> LayerFactors:
    """Factors by the names of `LAYER_GROUPS`; groups that are not listed have 1.

    Raises AdapterError for an unknown family or group, and for NaN and infinity.
    """
    factors = [1.0] * _transformers(family)
    for name, factor in groups.items():
        if name not in LAYER_GROUPS:
            raise AdapterError(f"Unknown layer group {name!r}. Use one of: {', '.join(LAYER_GROUPS)}.")
        if not math.isfinite(factor):
            raise AdapterError(f"{name} is {factor}. Choose a number; 1 leaves the weight as it is.")
        for index in LAYER_GROUPS[name][family]:
            factors[index] = factor
    return LayerFactors(family, tuple(factors))


def parse_factors(family: str, text: str, name: str = "layers") -> LayerFactors:
    """Factors as "index:factor" separated by commas or newlines, such as "3:2.5, 6:1"; transformers that are not
    listed get 0. `name` is that of the input, for messages.

    Raises AdapterError for an unknown family, what is not such an entry, an index that the family has not, one that is
    listed twice, and factors beyond `MOST_FACTOR`.
    """
    count = _transformers(family)
    given: dict[int, float] = {}
    for place, entry in entries(text):
        left, colon, right = entry.partition(":")
        index, factor = _number(left), _number(right)
        where = f"{name}: entry {place}, {entry!r},"
        if not colon or index is None or factor is None or index != int(index):
            raise AdapterError(f"{where} is not index:weight. Write for example 3:2.5, 6:1.")
        if not 0 <= index < count:
            raise AdapterError(
                f"{where} names transformer {index:g}; {FAMILY_NAMES[family]} has {count}, from 0 to {count - 1}."
            )
        if int(index) in given:
            raise AdapterError(f"{where} names transformer {index:g} a second time. Keep one of the two.")
        check_factor(factor, where)
        given[int(index)] = factor
    return LayerFactors(family, tuple(given.get(index, 0.0) for index in range(count)))


def _transformers(family: str) -> int:
    if family not in _FAMILIES:
        raise AdapterError(f"Unknown family {family!r}. Use one of: {', '.join(_FAMILIES)}.")
    return WEIGHT_LAYOUTS[family].transformers


def check_factor(factor: float, where: str) -> None:
    """Raises AdapterError for a factor of a text that is too large: float16 ends at 65,504."""
    if abs(factor) > MOST_FACTOR:
        raise AdapterError(f"{where} is too large. Choose numbers from {-MOST_FACTOR:g} to {MOST_FACTOR:g}.")


def family_of_layout(layout: WeightLayout) -> str | None:
    """The key of `LAYER_GROUPS`' families for a UNet, or None for a UNet of another layout."""
    return next((family for family in _FAMILIES if WEIGHT_LAYOUTS[family] == layout), None)


def group_indices(group: str, layout: WeightLayout) -> range:
    """The transformers of a group, or of the whole UNet for "all".

    Raises AdapterError for a group where the layout has none.
    """
    if group == "all":
        return range(layout.transformers)
    family = family_of_layout(layout)
    if family is None:
        raise AdapterError(
            f"The layers {group!r} are known for SD1.5, SD2 and SDXL; the connected model has {layout} transformers "
            "before, in and after the middle block. Use 'all'."
        )
    return LAYER_GROUPS[group][family]


def entries(text: str) -> list[tuple[int, str]]:
    """(number, entry) of a text separated by commas or newlines, numbered from 1, without empty entries."""
    parts = [part.strip() for part in text.replace("\n", ",").split(",")]
    return list(enumerate((part for part in parts if part), start=1))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
