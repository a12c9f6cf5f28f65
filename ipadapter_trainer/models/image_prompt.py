"""An image prompt for generation: the adapter's keys and values, its weights and its LoRA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipadapter_core import AdapterApplication, IPAdapter, KeyValue, LoraLayers, check_compatible

from ..errors import TrainerError
from .base_model import BaseModel
from .image_features import dropped_features


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Keys and values of 1 or B rows, computed once for all steps; those of the negative image, 1 row; the LoRA."""

    positive: Sequence[KeyValue]
    negative: Sequence[KeyValue] | None
    lora: LoraLayers | None

    def application(self, rows: Tensor, weights: list[float]) -> AdapterApplication:
        """The adapter's application to some rows of the batch; negative rows first, as in the text states."""
        pairs: list[KeyValue] = [_rows(pair, rows) for pair in self.positive]
        if self.negative is not None:
            first = torch.zeros_like(rows)
            both = zip((_rows(pair, first) for pair in self.negative), pairs, strict=True)
            pairs = [KeyValue(*map(torch.cat, zip(*pair, strict=True))) for pair in both]
            weights = weights + weights
        same = len(set(weights)) == 1
        return AdapterApplication(
            pairs,
            weights[0] if same else torch.tensor(weights, device=rows.device),
            lora=self.lora,
            lora_weight=weights[0],
            rows=range(len(weights)),
        )


def encode_image_prompt(
    base_model: BaseModel, adapter: IPAdapter, features: tuple[Tensor, ...], guided: bool
) -> ImagePrompt:
    """Compute an adapter's keys and values from features, and those of a dropped image when `guided`.

    Raises AdapterError for an adapter or features that do not fit, TrainerError for values that are not finite.
    """
    check_compatible(adapter.spec, base_model.sites)
    like, device = next(adapter.parameters()), base_model.device

    def tokens_of(parts: Sequence[Tensor]) -> Tensor:
        longest = max(map(len, parts))
        return adapter.encode(*(p.to(like).expand(longest, *p.shape[1:]) for p in parts))

    def keys_values(tokens: Tensor) -> list[KeyValue]:
        return [KeyValue(*(part.to(device) for part in pair)) for pair in adapter.keys_values(tokens)]

    tokens = tokens_of(features)
    _check_finite(features, tokens, "the image prompt")
    negative = None
    if guided:
        dropped = dropped_features(base_model, adapter.spec)
        none = tokens_of(dropped)
        _check_finite(dropped, none, "the negative image")
        # Several faces give the tokens of each.
        negative = keys_values(none.repeat(1, tokens.shape[1] // none.shape[1], 1))
    # A LoRA computes in the UNet's precision; the adapter's own weights stay as they are.
    lora = None if adapter.lora is None else copy.deepcopy(adapter.lora).to(device, base_model.dtype)
    return ImagePrompt(keys_values(tokens), negative, lora)


def _check_finite(features: Sequence[Tensor], tokens: Tensor, what: str) -> None:
    """Synchronises with the device, which training steps avoid."""
    for values, origin in ((features, "The image encoder"), ((tokens,), "The adapter")):
        if not all(part.isfinite().all() for part in values):
            raise TrainerError(
                f"{origin} makes NaN or infinity of {what}: its weights are damaged or overflow in this precision. "
                "Download it again, or use float32."
            )


def _rows(pair: KeyValue, rows: Tensor) -> KeyValue:
    """Some rows of keys and values [B, T, C]; a single row is repeated."""
    if len(pair.key) == 1:
        return KeyValue(*(part.expand(len(rows), -1, -1) for part in pair))
    return KeyValue(*(part[rows.to(part.device)] for part in pair))
