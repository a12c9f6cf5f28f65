"""Several image prompts -> one: joined, or calculated from their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..ipadapter_core import AdapterError
from ..ipadapter_core.image_prompt import combine_features
from .types import EncodedImages, ImagePrompt

_NOTHING = 1e-5  # of the features, is what rounding leaves


def combine_prompts(prompts: Mapping[str, ImagePrompt], combine: str) -> ImagePrompt:
    """Several image prompts, by their names for messages -> one.

    concat joins the images of all, each with its weight; of prompts with one image for each latent the images follow
    each other. The others calculate with features times weights: of all images, or with one image for each latent of
    the first image of every prompt, then of the second, and so on, without those of weight 0.

    A negative that all prompts share stays, with the mean weight. Different ones are joined, and with one image for
    each latent also those of different weights; only concat keeps their weights.

    Raises AdapterError for prompts that do not go together.
    """
    _check_alike(prompts)
    parts = list(prompts.values())
    positives = [prompt.positive for prompt in parts]
    if combine == "concat":
        positive = _join(positives)
    elif parts[0].one_each:
        count = _images_of_each(prompts)
        places = [[_at(images, place) for images in positives] for place in range(count)]
        positive = _join([_calculate_one(images, combine) for images in places])
        if not any(positive.weights):
            off = not any(weight for images in positives for weight in images.weights)
            raise _nothing_left(combine, "all weights are 0" if off else "no image is left to subtract from")
    else:
        positive = _calculate(positives, combine)
    return dataclasses.replace(
        parts[0],
        positive=positive,
        negative=_combine_negatives(parts, positive.weights, joined=combine == "concat"),
        adapter=next((prompt.adapter for prompt in parts if prompt.adapter is not None), None),
        has_negative=any(prompt.has_negative for prompt in parts),
    )


def _check_alike(prompts: Mapping[str, ImagePrompt]) -> None:
    def check(what: Callable[[ImagePrompt], str], advice: str) -> None:
        found = [(name, what(prompt)) for name, prompt in prompts.items()]
        first, description = next(((name, text) for name, text in found if text), ("", ""))
        for name, other in found:
            if other not in ("", description):
                raise AdapterError(f"{first} {description}, {name} {other}. {advice}")

    check(lambda prompt: f"was encoded with {prompt.adapter}" if prompt.adapter else "", "Use one adapter for all.")
    check(
        lambda prompt: f"has {'one image for each latent' if prompt.one_each else 'images that act together'}",
        "Turn one_each on or off in all.",
    )
    check(lambda prompt: f"has likeness {prompt.likeness:g}", "Set the same likeness for all.")
    check(lambda prompt: f"has features of {shapes_of(prompt.positive)}", "Use one image encoder for all.")
    for name, prompt in prompts.items():
        if prompt.negative is not None and shapes_of(prompt.negative) != shapes_of(prompt.positive):
            raise AdapterError(
                f"{name} has features of {shapes_of(prompt.positive)}, its negative images of "
                f"{shapes_of(prompt.negative)}. Use one image encoder for both."
            )


def shapes_of(images: EncodedImages) -> str:
    """Of one image's features: "257 x 1280", or "512 and 257 x 1280" with a face embedding."""
    return " and ".join(" x ".join(map(str, feature.shape[1:])) for feature in images.features)


def _images_of_each(prompts: Mapping[str, ImagePrompt]) -> int:
    counts = {name: len(prompt.positive) for name, prompt in prompts.items()}
    name, count = max(counts.items(), key=lambda item: item[1])
    for other, number in counts.items():
        if number not in (1, count):
            raise AdapterError(
                f"{name} has {count} images, one for each latent, and {other} {number}. Give each {count} images, "
                "or one for all latents."
            )
    return count


def _at(images: EncodedImages, place: int) -> EncodedImages:
    """One of several images; a single one is at every place."""
    row = min(place, len(images) - 1)
    return _mapped([images], lambda features: features[0][row : row + 1], images.weights[row : row + 1])


def _join(parts: Sequence[EncodedImages]) -> EncodedImages:
    return _mapped(parts, torch.cat, tuple(weight for images in parts for weight in images.weights))


def _calculate_one(parts: Sequence[EncodedImages], combine: str) -> EncodedImages:
    """`_calculate` of the images whose weight is not 0, such as the faces in a frame of several videos. With none, or
    none to subtract from, the image has the weight 0.
    """
    acting = [images for images in parts if any(images.weights)]
    if not acting or (combine == "subtract" and acting[0] is not parts[0]):
        return dataclasses.replace(parts[0], weights=(0.0,))
    return _calculate(acting, combine)


def _calculate(parts: Sequence[EncodedImages], combine: str) -> EncodedImages:
    """One image, calculated from the features times their weights."""
    weights = [weight for images in parts for weight in images.weights]

    def calculate(features: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(features))
        shares = torch.tensor(weights, dtype=joined.dtype, device=joined.device)
        made = combine_features(joined * shares.reshape(-1, *[1] * (joined.ndim - 1)), combine)
        if made.abs().amax() <= _NOTHING * joined.abs().amax():
            raise _nothing_left(combine, "the images cancel each other out" if any(weights) else "all weights are 0")
        return made

    made = _mapped(parts, calculate, (1.0,))
    return dataclasses.replace(made, weights=(1.0,) * len(made.features[0]))


def _nothing_left(combine: str, why: str) -> AdapterError:
    return AdapterError(
        f"combine {combine!r} leaves nothing: {why}. Change the weights, or choose another combine; weight 0 of Apply "
        "IP Adapter switches the image prompt off."
    )


def _mapped(
    parts: Sequence[EncodedImages], make: Callable[[list[Tensor]], Tensor], weights: tuple[float, ...]
) -> EncodedImages:
    """The image features of all parts -> one, and likewise the face embeddings."""

    def made(features: Iterable[Tensor | None]) -> Tensor | None:
        present = [feature for feature in features if feature is not None]
        return make(present) if present else None

    return EncodedImages(made(images.image for images in parts), made(images.face for images in parts), weights)


def _combine_negatives(
    prompts: Sequence[ImagePrompt], weights: Sequence[float], *, joined: bool
) -> EncodedImages | None:
    """`weights` are those of the positive images; `joined` of concat."""
    given = [prompt.negative for prompt in prompts if prompt.negative is not None]
    if not given:
        return None
    one_each, is_one_weight = prompts[0].one_each, len(set(weights)) == 1
    shared = min(given, key=len) if all(_is_same(given[0], prompt.negative) for prompt in prompts) else None
    if shared is not None and (not one_each or (is_one_weight and (len(shared) == 1 or not joined))):
        return dataclasses.replace(shared, weights=(sum(weights) / len(weights),) * len(shared))
    if one_each and not joined:
        if shared is None:
            raise AdapterError(
                "The image prompts have one image for each latent and different negative images. Give all of them the "
                "same image_negative, or combine them with 'concat'."
            )
        return dataclasses.replace(_for_each(shared, weights), weights=tuple(weights))
    negatives = [_zeros(prompt) if prompt.negative is None else prompt.negative for prompt in prompts]
    if one_each:  # the images of one prompt after those of the other
        own = [prompt.positive.weights for prompt in prompts]
        return _join([_for_each(*pair) for pair in zip(negatives, own, strict=True)])
    together = _join(negatives)
    return together if joined else dataclasses.replace(together, weights=(1.0,) * len(together))


def _for_each(images: EncodedImages, weights: Sequence[float]) -> EncodedImages:
    """The negative image beside each image of these weights, without weight where that has none."""
    rows = [_at(images, place) for place in range(len(weights))]
    return _join([row if own else row.weighted(0.0) for row, own in zip(rows, weights, strict=True)])


def _zeros(prompt: ImagePrompt) -> EncodedImages:
    """The negative of a prompt without one: zeros, one image or one for each with its weight."""
    images = prompt.positive
    weights = images.weights if prompt.one_each else prompt.weights[len(images) :]
    return _mapped([images], lambda features: torch.zeros_like(features[0][: len(weights)]), weights)


def _is_same(one: EncodedImages, other: EncodedImages | None) -> bool:
    """Whether two negatives are the same: a single image is at every place, and none is zeros."""
    if other is None:
        return not any(feature.any() for feature in one.features)
    return all(
        a is b or (len({1, len(a), len(b)}) < 3 and bool((a == b).all()))
        for a, b in zip(one.features, other.features, strict=True)
    )
