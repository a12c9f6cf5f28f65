"""One adapter in a UNet: its keys and values, weight, mask and LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from .attention import KeyValue
from .errors import AdapterError
from .lora import LoraLayers
from .masks import check_attention_mask, resize_mask
from .rows import row_numbers

Observe = Callable[[int, Tensor, Tensor], None]


@dataclass(eq=False)
class AdapterApplication:
    """One adapter in a UNet. Its fields may be replaced, not changed in place, between calls of the UNet.

    `key_values`: per layer in id order, [R, T, C] tensors of R image prompts. Set it once for sampling, in each step
    for training (gradients flow through it). None adds nothing.
    `rows`: the image prompt of each row of the UNet's batch, such as [0, 1] for a batch of [negative, positive]. None:
    the same for all rows when there is one image prompt; with more, pass `pipeline_rows` to the pipeline.
    `weight`: a number, a tensor of one number per row, or a sequence of one number per layer in id order. For another
    scaling than "V only" pass key_values through `attention.scale_keys_values` first.
    `mask`: [H, W] or [B, H, W], in 0..1 and not 0 everywhere.
    `lora`: the LoRA of a FaceID adapter, added with `lora_weight` to every attention layer.
    `name` is used in errors.
    `observe(layer_id, text_attention, image_attention)` is called in every layer that adds something, before the two
    are summed: both [B, N, C], the image attention with weight and mask.
    """

    key_values: Sequence[KeyValue] | None = None
    weight: float | Tensor | Sequence[float] = 1.0
    mask: Tensor | None = None
    lora: LoraLayers | None = None
    lora_weight: float = 1.0
    name: str = "adapter"
    observe: Observe | None = None
    rows: Sequence[int] | None = None
    _checked: dict[str, tuple[Any, tuple[int, ...]]] = field(
        default_factory=dict[str, tuple[Any, tuple[int, ...]]], init=False, repr=False
    )
    _mask: Tensor | None = field(default=None, init=False, repr=False)
    _batch_rows: list[int] | None = field(default=None, init=False, repr=False)
    _selected: dict[int, tuple[KeyValue, list[int], KeyValue]] = field(
        default_factory=dict[int, tuple[KeyValue, list[int], KeyValue]], init=False, repr=False
    )
    _resized: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[int, int], tuple[Tensor, Tensor]], init=False, repr=False
    )

    def check(self, layer_dims: Sequence[int], *, again: bool = True) -> None:
        """Check the fields for a UNet whose layers have these dims; unless `again`, only those that were replaced.

        Raises AdapterError for what is not for this UNet, weights that are not finite, and a mask that is 0 everywhere
        or in another unit.
        """
        self._check_key_values(layer_dims)
        checks = {"weight": self._check_weight, "mask": self._check_mask, "lora": self._check_lora}
        for name, check in checks.items():
            value, dims = self._checked.get(name, (None, ()))
            if again or value is not getattr(self, name) or dims != tuple(layer_dims):
                check(len(layer_dims))
                self._checked[name] = getattr(self, name), tuple(layer_dims)

    def _check_key_values(self, expected: Sequence[int]) -> None:
        if self.key_values is None:
            return
        dims = [pair.key.shape[-1] for pair in self.key_values]
        if dims != list(expected):
            at = next((i for i, (a, b) in enumerate(zip(dims, expected, strict=False)) if a != b), None)
            detail = "" if at is None else f"; layer {2 * at + 1} is {dims[at]} wide, the UNet's {expected[at]}"
            raise AdapterError(
                f"{self.name}: has {len(dims)} layers, the UNet has {len(expected)}{detail}. Use an adapter for "
                "this base model."
            )

    def _check_mask(self, layers: int) -> None:
        advice = "Pass another mask, or None for the whole image."
        self._mask = None if self.mask is None else check_attention_mask(self.mask, f"{self.name}: mask", advice)

    def _check_lora(self, layers: int) -> None:
        if self.lora is not None and len(list(self.lora.children())) != 2 * layers:
            raise AdapterError(
                f"{self.name}: its LoRA has {len(list(self.lora.children()))} layers, the UNet {2 * layers}. Use an "
                "adapter for this base model."
            )

    def _check_weight(self, layers: int) -> None:
        is_list = isinstance(self.weight, Sequence)
        weights = cast("Sequence[Any]", self.weight if is_list else [self.weight])
        for weight in weights:
            values: list[Any] = cast("Any", weight).flatten().tolist() if isinstance(weight, Tensor) else [weight]
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
                raise AdapterError(
                    f"{self.name}: weight is {self.weight!r}; expected a finite number, a tensor of one for each row "
                    "or a sequence of one for each layer."
                )
        if is_list and len(weights) != layers:
            raise AdapterError(
                f"{self.name}: {len(weights)} weights for {layers} layers. Pass one weight per layer, or one number."
            )

    def start_call(self, batch: int, rows: list[int] | None) -> None:
        """After `check`: prepare for a call of the UNet with `batch` rows; `rows` are those of `pipeline_rows`.

        Raises AdapterError when rows, weights or masks do not fit the batch.
        """
        if self.key_values is None or (isinstance(self.weight, (int, float)) and self.weight == 0):
            return
        weights = self.weight.numel() if isinstance(self.weight, Tensor) else 1
        masks = 1 if self._mask is None else len(self._mask)
        for what, count in (("weights", weights), ("masks", masks)):
            if count not in (1, batch):
                raise AdapterError(
                    f"{self.name}: {count} {what} for {batch} rows of the UNet's batch, those of guidance included. "
                    f"Pass 1, or {batch}."
                )
        self._batch_rows = self._rows_of(batch, rows)

    def _rows_of(self, batch: int, pipeline_rows: list[int] | None) -> list[int] | None:
        """The row of key_values for each row of the batch; None when they can be used as they are."""
        count = len(cast("Sequence[KeyValue]", self.key_values)[0].key)
        rows = pipeline_rows if self.rows is None else row_numbers(self.rows)
        if pipeline_rows is not None and rows != pipeline_rows:
            raise AdapterError(
                f"{self.name}: rows are {rows}, and pipeline_rows makes them {pipeline_rows}. Use only one of the two."
            )
        if rows is None:
            if count == 1:
                return None
            raise AdapterError(
                f"{self.name}: {count} rows of image keys, and nothing tells which of them each of the {batch} rows of "
                "the UNet's batch uses. Pass ip_adapter_image_embeds=pipeline_rows() to the pipeline, or set rows."
            )
        if len(rows) != batch or max(rows) >= count:
            raise AdapterError(
                f"{self.name}: the rows are {rows}; expected {batch} numbers below {count}, one for each row of "
                f"the UNet's batch, among {count} rows of image keys."
            )
        return None if rows == list(range(count)) else rows

    def layer_weight(self, index: int) -> float | Tensor:
        """The weight of the layer at `index` (id order)."""
        return self.weight if isinstance(self.weight, (int, float, Tensor)) else self.weight[index]

    def layer_key_values(self, index: int) -> KeyValue:
        """Keys and values of the layer at `index` for this call's batch, [1 or B, T, C]."""
        pair, rows = cast("Sequence[KeyValue]", self.key_values)[index], self._batch_rows
        if rows is None:
            return pair
        source, selected_rows, selected = self._selected.get(index, (None, None, pair))
        if source is not pair or selected_rows != rows:
            selected = KeyValue(*(part[rows] for part in pair))
            self._selected[index] = (pair, rows, selected)
        return selected

    def layer_mask(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """The mask on a layer's grid, [B or 1, N, 1], resized once for each grid."""
        mask = cast("Tensor", self._mask)
        source, resized = self._resized.get(grid, (None, mask))
        if source is not mask or resized.device != like.device or resized.dtype != like.dtype:
            resized = resize_mask(mask, grid).to(like)
            self._resized[grid] = (mask, resized)
        return resized
