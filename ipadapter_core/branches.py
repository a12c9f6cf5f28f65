"""The branches of classifier-free guidance, positive and negative: their rows in a batch, their keys and values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import KeyValue, Scaling, scale_keys_values
from .errors import AdapterError
from .weight_types import LayerWeight

POSITIVE, NEGATIVE = 0, 1
_UNCONDITIONAL = ("null", "uncond", "empty")  # in names of conds
MOST_REPEATS = 8  # of the images of the larger branch


def branch_rows(positives: int, negatives: int, *, one_each: bool, swapped: bool) -> tuple[int, int]:
    """The number of rows that `fold_weights` makes for the positive and for the negative branch.

    Joined images are one row per branch. With `one_each` every image has its own row; a single negative image is used
    for all. In `swapped` layers the negative branch gets the positive images.

    Raises AdapterError when with `one_each` there are several negative images, but not as many as positive ones, and
    when joined images have to be repeated more than `MOST_REPEATS` times.
    """
    if not one_each:
        joined = math.lcm(max(1, positives), max(1, negatives))
        if joined > MOST_REPEATS * max(positives, negatives):
            raise AdapterError(
                f"{positives} images and {negatives} negative images would have to be repeated {joined // positives} "
                f"and {joined // negatives} times for the same number of tokens. Use as many negative images as "
                "images, or a single one."
            )
        return 1, 1
    if negatives not in (1, positives):
        raise AdapterError(
            f"There are {positives} images, one for each latent, and {negatives} negative images. Use one negative "
            f"image, or {positives}."
        )
    return positives, positives if swapped else negatives


def fold_weights(
    pair: KeyValue,
    weight: LayerWeight,
    weights: Sequence[float],
    rows: tuple[int, int],
    scaling: Scaling = "V only",
    *,
    positives: int,
    one_each: bool = False,
) -> KeyValue | None:
    """Keys and values of one layer for both branches, with all weights folded in; None when the weight is 0.

    `pair` has the keys and values of `positives` positive images, then of the negative ones, [images, T, C];
    `weights` has one factor for each of them, on top of `weight`; `rows` is from `branch_rows`. Returns
    [sum(rows), L, C], the positive branch first: L is T with `one_each`, else T times the joined images. A branch
    without images has values of 0. "V only" multiplies V, which equals multiplying the attention's output.

    Raises AdapterError as `scale_keys_values` does.
    """
    if weight.weight == 0.0:
        return None
    shares = torch.tensor(weights, dtype=torch.float32, device=pair.key.device)
    images = KeyValue(pair.key[:positives], pair.value[:positives])
    positive = _weighted(images, shares[:positives] * weight.positive, scaling)
    if weight.swapped:
        negative = _weighted(images, shares[:positives] * weight.positive_into_negative, scaling)
    else:
        negatives = KeyValue(pair.key[positives:], pair.value[positives:])
        negative = _weighted(negatives, shares[positives:] * weight.negative, scaling)
    if not one_each:
        return KeyValue(*(torch.cat(join_images(*parts)) for parts in zip(positive, negative, strict=True)))
    return KeyValue(
        *(torch.cat([p, n.expand(rows[1], -1, -1)]) for p, n in zip(positive, negative, strict=True)),
    )


def join_images(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """[P, T, C] and [N, T, C] -> both as one row of equal length [1, L * T, C], L the least common multiple of P and N.

    Repeating all tokens of a side does not change its attention.
    """
    images = math.lcm(positive.shape[0], negative.shape[0])
    first, second = (side.repeat(images // side.shape[0], 1, 1).flatten(0, 1)[None] for side in (positive, negative))
    return first, second


def _weighted(pair: KeyValue, weights: Tensor, scaling: Scaling) -> KeyValue:
    """[N, T, C], each row with its weight. With a weight of 0 the values are 0, in every scaling."""
    scaled, factor = scale_keys_values(pair, weights, scaling)
    factor = factor if isinstance(factor, Tensor) else weights != 0.0
    return KeyValue(scaled.key, scaled.value * factor.reshape(-1, 1, 1).to(scaled.value))


def names_by_uuid(conds: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[Hashable, frozenset[str]]:
    """A ComfyUI guider's conds -> the names ("positive", "negative", "middle", ...) of each cond's uuid.

    A guider of another pack may have names of its own. Those of an unconditional branch, such as "null", and those
    that it marks as negative (`prompt_type`) become "null (negative)".
    """
    names: dict[Hashable, frozenset[str]] = {}
    for name, items in conds.items():
        for item in items or ():
            if "uuid" in item:
                own = f"{name} (negative)" if _is_unconditional(name, item) else name
                names[item["uuid"]] = names.get(item["uuid"], frozenset()) | {own}
    return names


def _is_unconditional(name: str, item: Mapping[str, Any]) -> bool:
    if name in ("positive", "middle"):  # DualCFG marks "middle" as negative, for inpainting models
        return False
    return item.get("prompt_type") == "negative" or any(word in name for word in _UNCONDITIONAL)


def resolve_branches(
    cond_or_uncond: Sequence[int],
    uuids: Sequence[Hashable] | None,
    names: Mapping[Hashable, frozenset[str]] | None,
) -> tuple[int, ...]:
    """The branch, POSITIVE or NEGATIVE, of each chunk of a batch.

    A cond is negative when it has a name with "negative" in it ("negative", "empty_negative_prompt"). `cond_or_uncond`
    is only an index into the guider's list, so it is used (0 is positive) only for a cond without a name, or with names
    of both branches.
    """
    branches: list[int] = []
    for chunk, index in enumerate(cond_or_uncond):
        listed = (names or {}).get(uuids[chunk], frozenset[str]()) if uuids and chunk < len(uuids) else frozenset[str]()
        named = {NEGATIVE if "negative" in name else POSITIVE for name in listed}
        branches.append(named.pop() if len(named) == 1 else (POSITIVE if index == 0 else NEGATIVE))
    return tuple(branches)


def source_rows(declared: Sequence[int], chunks: Sequence[int], before: int, batch: int, copies: int = 1) -> list[int]:
    """Maps each row of a batch that regional prompts have enlarged to its row in the original batch.

    `chunks` has the cond of each chunk of the original batch, of `before` rows; `declared` that of each chunk of the
    enlarged one, of `batch` rows, which repeats them. `copies`: of the chunks in the original batch.

    Raises AdapterError when the batch does not divide into its chunks, one of them is not in the original batch, or
    that has several copies, whose order in the enlarged one is not known.
    """
    rows = rows_each(len(declared), batch)
    if copies > 1:
        raise AdapterError(
            f"One node samples {copies} tiles in a batch, another one changes its {before} rows to {batch} inside a "
            "layer. Set the batch of tiles to 1, or leave one of the nodes out."
        )
    if not set(declared) <= set(chunks):
        raise AdapterError(
            f"Another node made conditionings {list(declared)} of {list(chunks)} inside a layer. Connect it after the "
            "image prompt."
        )
    each = before // len(chunks)
    return [chunks.index(index) * each + row % each for index in declared for row in range(rows)]


def rows_each(chunks: int, batch: int) -> int:
    """The rows of each chunk of a batch. Raises AdapterError when the batch does not divide into the chunks."""
    if not chunks or batch % chunks:
        raise AdapterError(
            f"A batch of {batch} rows does not divide into {chunks} conditionings. Another node changes the "
            "batch; connect it after the image prompt."
        )
    return batch // chunks
