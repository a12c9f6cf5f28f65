"""The two branches of classifier-free guidance: which row of a batch is which, and what acts in each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .attention import KeyValue, Scaling, scale_keys_values
from .errors import AdapterError
from .weight_types import LayerWeight

POSITIVE, NEGATIVE = 0, 1  # the rows of a folded KeyValue


def fold_weights(
    positive: KeyValue,
    negative: KeyValue,
    weight: LayerWeight,
    scaling: Scaling = "V only",
    *,
    images: int = 1,
) -> KeyValue | None:
    """Both branches of one layer with the weight inside: [2, T, C] tensors, row 0 for the positive branch and
    row 1 for the negative one. The attention to them is added as it is. None when the weight is 0.

    positive and negative are [1, T, C] each, see `join_tokens`; `images` counts the pictures in T. A branch
    that gets nothing has values of 0. "V only" multiplies V, which equals multiplying the attention's output.

    Raises AdapterError as `scale_keys_values` does.
    """
    if weight.weight == 0.0:
        return None
    nothing = KeyValue(positive.key, torch.zeros_like(positive.value))
    rows = {
        POSITIVE: nothing if weight.swapped else _weighted(positive, weight.positive, scaling, images),
        NEGATIVE: _weighted(positive, weight.positive_into_negative, scaling, images)
        if weight.swapped
        else _weighted(negative, weight.negative, scaling, images),
    }
    return KeyValue(
        torch.cat([rows[POSITIVE].key, rows[NEGATIVE].key]), torch.cat([rows[POSITIVE].value, rows[NEGATIVE].value])
    )


def _weighted(pair: KeyValue, weight: float, scaling: Scaling, images: int) -> KeyValue:
    scaled, left = scale_keys_values(pair, weight, scaling, images=images)
    return KeyValue(scaled.key, scaled.value * left)


def names_by_uuid(conds: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[Hashable, frozenset[str]]:
    """A ComfyUI guider's conds -> the names ("positive", "negative", "middle", ...) under which each uuid is listed."""
    names: dict[Hashable, frozenset[str]] = {}
    for name, items in conds.items():
        for item in items or ():
            if "uuid" in item:
                names[item["uuid"]] = names.get(item["uuid"], frozenset()) | {name}
    return names


def chunk_branches(
    cond_or_uncond: Sequence[int],
    uuids: Sequence[Hashable] | None,
    names: Mapping[Hashable, frozenset[str]] | None,
) -> tuple[int, ...]:
    """The branch of each chunk of a batch.

    A chunk is negative when the guider lists it under a name with "negative" in it ("negative",
    "empty_negative_prompt"). `cond_or_uncond` is only an index into whatever list the guider passed, so it
    decides (0 is positive) only for a chunk without a name or with names of both branches.
    """
    branches: list[int] = []
    for place, index in enumerate(cond_or_uncond):
        known = (names or {}).get(uuids[place], frozenset[str]()) if uuids and place < len(uuids) else frozenset[str]()
        claims = {NEGATIVE if "negative" in name else POSITIVE for name in known}
        branches.append(claims.pop() if len(claims) == 1 else (POSITIVE if index == 0 else NEGATIVE))
    return tuple(branches)


def row_branches(branches: Sequence[int], batch: int) -> list[int]:
    """The branch of each of `batch` rows; every chunk has the same number of rows.

    Raises AdapterError when the batch does not divide into the chunks.
    """
    rows = _rows_each(len(branches), batch)
    return [branch for branch in branches for _ in range(rows)]


def grown_rows(declared: Sequence[int], chunks: Sequence[int], before: int, batch: int) -> list[int]:
    """For each row of a batch that was changed inside a layer, the row of the batch from before that it stands for.

    `chunks` has the index of each chunk of the `before` rows, `declared` that of each chunk of the `batch` rows,
    as regional prompts declare them: several for one that came in.

    Raises AdapterError when the batch does not divide into what is declared, or an index is new.
    """
    rows = _rows_each(len(declared), batch)
    if not set(declared) <= set(chunks):
        raise AdapterError(
            f"Another node made conditionings {list(declared)} of {list(chunks)} inside a layer. Connect it after the "
            "image prompt."
        )
    each = before // len(chunks)
    return [chunks.index(index) * each + row % each for index in declared for row in range(rows)]


def _rows_each(chunks: int, batch: int) -> int:
    if not chunks or batch % chunks:
        raise AdapterError(
            f"A batch of {batch} rows does not divide into {chunks} conditionings. Another node changes the "
            "batch; connect it after the image prompt."
        )
    return batch // chunks
