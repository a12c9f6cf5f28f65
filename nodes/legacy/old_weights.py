"""The weight of each transformer of the UNet, with the old pack's middle block, which gets nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...ipadapter_core import AdapterError, LayerWeight, cross_attention_sites, layer_weights, weight_layout
from ...ipadapter_core.weight_types import WEIGHT_LAYOUTS, WeightLayout, parse_weight_type
from .inputs import read_number
from .setting import is_corrected

if TYPE_CHECKING:
    from .execute import OldPrompt

_PRECISE = {"style_boost": "style transfer precise", "composition_boost": "composition precise"}
_SDXL = WEIGHT_LAYOUTS["sdxl"]


@dataclass(frozen=True)
class Shares:
    """Weights by transformer, and on top one for each image. `of_composition`: of the composition image."""

    layers: tuple[LayerWeight, ...]
    weights: list[float]
    of_composition: bool = False


def layer_shares(model: Any, prompt: OldPrompt) -> list[Shares]:
    """What to apply: usually one; more where a list of weights or a second image acts in some layers only."""
    layout = weight_layout(cross_attention_sites(model.get_model_object("diffusion_model")))
    boosted = (name for boost, name in _PRECISE.items() if getattr(prompt, boost) is not None)
    weight_type = next(boosted, prompt.weight_type)
    weights = prompt.weights
    if prompt.layer_weights and prompt.layer_weights.strip():
        parts = [Shares(_listed(prompt.layer_weights, weight_type, layout), weights)]
    else:
        parts = _typed(prompt, parse_weight_type(weight_type), layout, weights)
    if not is_corrected():
        parts = [replace(part, layers=_without_middle(part.layers, layout)) for part in parts]
    if prompt.image_composition is not None:
        parts = _split_composition(parts, layout)
    return _merged(parts, layout)


def _typed(prompt: OldPrompt, weight_type: str, layout: WeightLayout, weights: list[float]) -> list[Shares]:
    """Layers that follow `weight`, which may differ by image, and layers with a weight of their own."""
    boost = prompt.style_boost if prompt.style_boost is not None else prompt.composition_boost
    following = layer_weights(weight_type, layout, 1.0, weight_composition=0.0, boost=None if boost is None else 0.0)
    parts = [Shares(following, weights)]
    own = prompt.weight_composition
    frames = [float(weight) for weight in own] if isinstance(own, list) else [float(own)]
    alone = (layer_weights(weight_type, layout, 0.0, weight_composition=1.0, boost=0.0), frames)
    boosted = (layer_weights(weight_type, layout, 0.0, weight_composition=0.0, boost=boost or 0.0), [1.0])
    parts.extend(Shares(layers, share if prompt.unfold else share[:1]) for layers, share in (alone, boosted))
    return parts


def _listed(text: str, weight_type: str, layout: WeightLayout) -> tuple[LayerWeight, ...]:
    """The form "3:1.0, 6:0.8": transformer and weight; the others get nothing."""
    found: dict[int, float] = {}
    for item in text.replace("\n", ",").split(","):
        if not item.strip():
            continue
        try:
            index, weight = item.split(":")
            found[int(index)] = read_number(weight)
        except ValueError:
            raise AdapterError(
                f"layer_weights: {item.strip()!r} is no pair of layer and weight. Write pairs such as 3:1.0, 6:0.8."
            ) from None
    precise = weight_type if weight_type in _PRECISE.values() else ""
    swapped = layer_weights(precise or "linear", layout, 1.0)
    return tuple(LayerWeight(found.get(index, 0.0), swapped[index].swapped) for index in range(layout.transformers))


def _without_middle(layers: tuple[LayerWeight, ...], layout: WeightLayout) -> tuple[LayerWeight, ...]:
    middle = range(layout.inputs, layout.inputs + layout.middle)
    return tuple(LayerWeight(0.0) if index in middle else layer for index, layer in enumerate(layers))


def _split_composition(parts: list[Shares], layout: WeightLayout) -> list[Shares]:
    """Of a second image, the composition layer of SDXL takes the tokens."""
    if layout != _SDXL:
        raise AdapterError("Style & Composition is for SDXL models. Use IPAdapter Advanced with SD1.5 models.")
    split: list[Shares] = []
    for part in parts:
        for of_composition in (False, True):
            layers = tuple(
                layer if (index == 3) == of_composition else LayerWeight(0.0) for index, layer in enumerate(part.layers)
            )
            split.append(replace(part, layers=layers, of_composition=of_composition))
    return split


def _merged(parts: list[Shares], layout: WeightLayout) -> list[Shares]:
    """One part for all layers whose weight is the same for every image, of each image that they take."""
    merged: list[Shares] = []
    for of_composition in (False, True):
        mine = [part for part in parts if part.of_composition == of_composition]
        layers = [LayerWeight(0.0)] * layout.transformers
        for part in (part for part in mine if len(set(part.weights)) == 1):
            for index, layer in enumerate(part.layers):
                if layer.weight:
                    layers[index] = LayerWeight(layer.weight * part.weights[0], layer.swapped)
        merged.append(Shares(tuple(layers), [1.0], of_composition))
        merged.extend(part for part in mine if len(set(part.weights)) > 1)
    return [part for part in merged if any(layer.weight for layer in part.layers) and any(part.weights)]
