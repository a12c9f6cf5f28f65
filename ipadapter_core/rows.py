"""The image prompt of each row of a diffusers UNet's batch.

Guidance, perturbed-attention guidance and `num_images_per_prompt` all change the batch, and its size does not show
which of them did. A pipeline treats its `ip_adapter_image_embeds` exactly like its batch, so row numbers are passed
there and arrive in the UNet's `added_cond_kwargs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .errors import AdapterError

ROWS = "ipadapter_core.rows"  # in added_cond_kwargs, for injections below the first


def pipeline_rows(positive: Sequence[int] = (1,), negative: int = 0) -> list[Tensor]:
    """`ip_adapter_image_embeds` for a diffusers pipeline whose UNet has an injected adapter.

    `positive`: the row of `key_values` for all generated images, or one row for each in the order of the pipeline's
    output. `negative`: the row for all negative branches. The default fits key_values of [negative, positive] and any
    number of prompts; `pipeline_rows([1, 2])` gives two generated images an image prompt each. Works with and without
    guidance.

    Raises AdapterError for anything but whole numbers from 0 on; while the pipeline runs, for another number of
    images.
    """
    numbers, (negative,) = row_numbers(positive), row_numbers([negative])
    rows = torch.tensor(numbers).reshape(-1, 1, 1).as_subclass(_Rows)
    rows.negative_row = negative
    return [rows]


def row_numbers(rows: Any) -> list[int]:
    """Rows of key_values as a list. Raises AdapterError for anything but one or more whole numbers from 0 on."""
    listed: Any = cast("Any", rows).tolist() if isinstance(rows, Tensor) else rows
    numbers: list[Any] = list(cast("Iterable[Any]", listed)) if isinstance(listed, Iterable) else []
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise AdapterError(
            f"rows {rows!r}: expected rows of key_values, whole numbers from 0 on, such as [0, 1]: one for all, or one "
            "for each image."
        )
    return numbers


class _Rows(Tensor):
    """Row numbers [B, 1, 1]: pipelines require 3 dims, and no image embedding has a single channel."""

    negative_row: int = 0

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With guidance, a pipeline splits its embeds into the negative and the positive ones."""
        if (chunks, dim) != (2, 0):
            raise AdapterError(
                f"The pipeline splits its image embeds into {chunks} branches of guidance; expected 2, negative and "
                "positive. Set AdapterApplication.rows instead, to the row of key_values for each row of its batch."
            )
        return torch.full_like(self, self.negative_row).as_subclass(_Rows), self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.cat and all(part is args[0][0] for part in args[0]):
            return _one_each(cast("Tensor", args[0][0]).as_subclass(Tensor), images=len(args[0]))
        # Every other result is a plain tensor.
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return func(*args, **(kwargs or {}))


def _one_each(rows: Tensor, images: int) -> Tensor:
    """A pipeline repeats its image embeds once for each image; rows that are one for each image already stay."""
    if len(rows) not in (1, images):
        raise AdapterError(
            f"pipeline_rows has {len(rows)} rows, the pipeline makes {images} images. Give one row for all "
            f"images, or {images}."
        )
    return rows.expand(images, -1, -1)


def take_rows(kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The row numbers in the keyword arguments of a UNet's call, and the arguments as the UNet expects them.

    The caller's dict is not changed: a pipeline passes the same one in every step.
    """
    added = cast("dict[str, Any]", kwargs.get("added_cond_kwargs") or {})
    if ROWS in added:
        return added[ROWS], kwargs
    embeds = added.get("image_embeds")
    if not isinstance(embeds, (list, tuple)):
        return None, kwargs
    items = cast("Sequence[Tensor]", embeds)
    ours = [item for item in items if item.shape[1:] == (1, 1)]
    if not ours:
        return None, kwargs
    if len(ours) > 1:
        raise AdapterError(
            f"ip_adapter_image_embeds holds {len(ours)} pipeline_rows. Pass one: it holds for every adapter of inject."
        )
    others = [item for item in items if item is not ours[0]]
    return ours[0], {**kwargs, "added_cond_kwargs": {**added, "image_embeds": others, ROWS: ours[0]}}
