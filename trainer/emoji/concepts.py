"""The sixteen concepts that are asked for by text in the quality table. They are always in the training split."""

from __future__ import annotations

# Distinct in shape, each in every style, none a look-alike of another.
TEXT_CONCEPTS = (
    "airplane",
    "banana",
    "bicycle",
    "birthday-cake",
    "bus",
    "cat-face",
    "christmas-tree",
    "fish",
    "guitar",
    "house",
    "key",
    "mushroom",
    "red-heart",
    "rocket",
    "star",
    "umbrella",
)
