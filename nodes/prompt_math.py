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
    the first image of every prompt, then of the second, and so on.

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
        positive = _join([_calculate([_at(images, place) for images in positives], combine) for place in range(count)])
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


def _calculate(parts: Sequence[EncodedImages], combine: str) -> EncodedImages:
    """One image, calculated from the features times their weights."""
    weights = [weight for images in parts for weight in images.weights]

    def calculate(features: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(features))
        shares = torch.tensor(weights, dtype=joined.dtype, device=joined.device)
        made = combine_features(joined * shares.reshape(-1, *[1] * (joined.ndim - 1)), combine)
        if made.abs().amax() <= _NOTHING * joined.abs().amax():
            why = "the images cancel each other out" if any(weights) else "all weights are 0"
            raise AdapterError(
                f"combine {combine!r} leaves nothing: {why}. Change the weights, or choose another combine; weight 0 "
                "of Apply IP Adapter switches the image prompt off."
            )
        return made

    made = _mapped(parts, calculate, (1.0,))
    return dataclasses.replace(made, weights=(1.0,) * len(made.features[0]))


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
    given = [prompt.negative for prompt in prompts]
    if all(negative is None for negative in given):
        return None
    one_each, first = prompts[0].one_each, given[0]
    follow = one_each and joined  # the images of one prompt after those of the other
    single = first is not None and len(first) == 1 and len(set(weights)) == 1
    if first is not None and all(_is_same(first, other) for other in given) and (single or not follow):
        return dataclasses.replace(first, weights=(sum(weights) / len(weights),) * len(first))
    negatives = [_zeros(prompt) if prompt.negative is None else prompt.negative for prompt in prompts]
    if one_each and not joined:
        raise AdapterError(
            "The image prompts have one image for each latent and different negative images. Give all of them the same "
            "image_negative, or combine them with 'concat'."
        )
    if follow:
        counts = [len(prompt.positive) for prompt in prompts]
        return _join([_at(images, place) for images, n in zip(negatives, counts, strict=True) for place in range(n)])
    together = _join(negatives)
    return together if joined else dataclasses.replace(together, weights=(1.0,) * len(together))


def _zeros(prompt: ImagePrompt) -> EncodedImages:
    """The negative image of a prompt without one: zeros."""
    images = prompt.positive
    return _mapped([images], lambda features: torch.zeros_like(features[0][:1]), prompt.weights[len(images) :])


def _is_same(one: EncodedImages | None, other: EncodedImages | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(one.features, other.features, strict=True)
    return all(a is b or torch.equal(a, b) for a, b in pairs)
