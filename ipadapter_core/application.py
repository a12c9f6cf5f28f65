"""One adapter at work in a UNet: its keys and values, how strong they are, where, and for which rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from .attention import KeyValue
from .errors import AdapterError
from .lora import LoraLayers
from .masks import resize_mask
from .rows import row_numbers

Observe = Callable[[int, Tensor, Tensor], None]


@dataclass(eq=False)
class AdapterApplication:
    """One adapter at work in a UNet. Its fields may be set between steps; processors read the current ones.

    `key_values`: per layer in id order, [R, T, C] tensors of R image prompts. While sampling set it once; while
    training set it each step, gradients flow through it. None adds nothing. `rows`: which of the R each row of the
    UNet's batch uses, such as [0, 1] for a batch of [negative, positive]. None: a single image prompt is for all
    rows; with more, a pipeline tells it (`pipeline_rows`), and a call that does not tell is refused.
    `weight`: a number, a tensor of one number per row, or a sequence of numbers with one per layer in id order.
    For another scaling than "V only" pass key_values through `scale_keys_values` first.
    `mask`: [H, W] or [B, H, W]. `lora`: the LoRA of a FaceID adapter, added with `lora_weight` to every
    attention layer. `name` is for errors. `observe(layer_id, text_attention, image_attention)` is called in
    every layer that adds something with what is about to be summed, both [B, N, C] and before `to_out`; the
    image attention is this application's, weight and mask included.
    """

    key_values: Sequence[KeyValue] | None = None
    weight: float | Tensor | Sequence[float] = 1.0
    mask: Tensor | None = None
    lora: LoraLayers | None = None
    lora_weight: float = 1.0
    name: str = "adapter"
    observe: Observe | None = None
    rows: Sequence[int] | None = None
    _taken: dict[int, tuple[KeyValue, list[int], KeyValue]] = field(
        default_factory=dict[int, tuple[KeyValue, list[int], KeyValue]], init=False, repr=False
    )
    _resized: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[int, int], tuple[Tensor, Tensor]], init=False, repr=False
    )

    def layer_weight(self, index: int) -> float | Tensor:
        """The weight of the layer at `index` (id order)."""
        if isinstance(self.weight, (int, float, Tensor)):
            return self.weight
        return self.weight[index]

    def layer_key_values(self, index: int, batch: int, told: list[int] | None) -> KeyValue:
        """Keys and values of the layer at `index`, [1 or batch, T, C]; `told` are the rows that the pipeline tells."""
        pair = cast("Sequence[KeyValue]", self.key_values)[index]
        count, rows = len(pair.key), told if self.rows is None else row_numbers(self.rows)
        if told is not None and rows != told:
            raise AdapterError(
                f"{self.name}: rows are {rows}, and pipeline_rows makes them {told}. Give one of the two alone."
            )
        if rows is None:
            if count == 1:
                return pair
            raise AdapterError(
                f"{self.name}: {count} rows of image keys, and nothing tells which of them each of the {batch} rows of "
                "the UNet's batch uses. Pass ip_adapter_image_embeds=pipeline_rows() to the pipeline, or set rows."
            )
        if len(rows) != batch or max(rows) >= count:
            raise AdapterError(
                f"{self.name}: the rows are {rows}; expected {batch} numbers below {count}, one for each row of "
                f"the UNet's batch, among {count} rows of image keys."
            )
        if rows == list(range(count)):
            return pair
        source, taken_rows, taken = self._taken.get(index, (None, None, pair))
        if source is not pair or taken_rows != rows:
            taken = KeyValue(*(part[rows] for part in pair))
            self._taken[index] = (pair, rows, taken)
        return taken

    def layer_mask(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """The mask on a layer's grid, [B or 1, N, 1]; each grid is computed once per mask."""
        mask = cast("Tensor", self.mask)
        source, resized = self._resized.get(grid, (None, mask))
        if source is not mask or resized.device != like.device or resized.dtype != like.dtype:
            resized = resize_mask(mask, grid).to(like)
            self._resized[grid] = (mask, resized)
        return resized
