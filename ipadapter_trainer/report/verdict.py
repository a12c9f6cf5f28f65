"""The verdict about a run: what its validation numbers mean, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Lines = Sequence[dict[str, float]]

RISEN = 0.03  # relative increase of the validation loss over its minimum that is mentioned


def validation_line(step: int, numbers: Mapping[str, float]) -> str:
    """The main numbers of a validation, in a line."""
    line = f"Validation at step {step:,}: loss {numbers['validation/loss']:.4f}"
    if "validation/gap_shuffled" in numbers:
        error = numbers.get("validation/gap_shuffled_error", 0.0)
        line += f", gap to another image {numbers['validation/gap_shuffled']:.4f} (standard error {error:.4f})"
    return f"{line}, gap to no image {numbers['validation/gap_no_image']:.4f}"


def read_verdict(validations: Lines) -> tuple[bool | None, str]:
    """Whether the adapter uses its image prompt (None: unknown), and the verdict in sentences.

    A gap is significant if it is larger than twice its standard error.
    """
    if not validations:
        return None, (
            "There was no validation: validation_images is 0, the data are a stream of shards, or there are fewer "
            "than ten images. The loss alone does not say whether the adapter uses its image prompt; look at what it "
            "generates."
        )
    last = validations[-1]
    if "validation/gap_shuffled" not in last:
        return None, "All held-out images have the same image prompt, so it could not be exchanged for another one."
    gap, error = last["validation/gap_shuffled"], last.get("validation/gap_shuffled_error", 0.0)
    numbers = f"{gap:.4f}, standard error {error:.4f}"
    reads = gap > 2 * error
    if reads:
        share = gap / (last["validation/loss"] + gap)
        first = (
            f"The adapter uses its image prompt: on held-out images, the loss is {share:.1%} lower with the right "
            f"image than with another one ({numbers})."
        )
    elif gap < -2 * error:
        first = (
            f"Something is wrong: on held-out images, the loss is higher with the right image than with another one "
            f"({numbers}). "
            "Check that the data pair each image with its own image."
        )
    else:
        first = (
            f"No gap yet: on held-out images, the loss is the same with the right image and with another one "
            f"({numbers}). Train for longer, and set more validation_images if there are few."
        )
    others = (_beside_the_base(last), _strength(last), _trend(validations) if reads else None)
    return reads, " ".join([first, *(sentence for sentence in others if sentence)])


def _beside_the_base(last: dict[str, float]) -> str | None:
    gap = last.get("validation/gap_no_image")
    if gap is None:
        return None
    if gap >= 0:
        return f"It is {gap:.4f} lower than without the adapter."
    return f"Without the adapter it is still {-gap:.4f} lower: at weight 1, the adapter disturbs more than it helps."


def _strength(last: dict[str, float]) -> str | None:
    ratio = last.get("validation/attention_ratio")
    return None if ratio is None else f"The image attention is {ratio:.0%} as strong as the text's."


def _trend(validations: Lines) -> str | None:
    """Whether more training would help."""
    if len(validations) < 3:
        return None
    last = validations[-1]
    lowest = min(validations, key=lambda line: line["validation/loss"])
    risen = last["validation/loss"] / lowest["validation/loss"] - 1
    if risen > RISEN:
        return (
            f"The validation loss was lowest at step {int(lowest['step']):,} and is {risen:.1%} higher now: a "
            "checkpoint from there may be the better adapter. More images or a lower learning rate help."
        )
    widest = max(validations, key=lambda line: line.get("validation/gap_shuffled", 0.0))
    if widest is last:
        return "The gap is larger than at any validation before: more training should help."
    return f"The gap was largest at step {int(widest['step']):,}; it no longer grows."
