"""The concepts with a part of their own: those asked for by text, and the image prompts that ComfyUI offers."""

from __future__ import annotations

# Asked for by text in the quality table: always in the training split, distinct in shape, each in every style, none a
# look-alike of another.
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

# (concept, style) of the held-out images that Load IP Adapter Demo offers: no model has seen them.
PROMPT_IMAGES = (
    ("crab", "fluent"),
    ("desert-island", "fxemoji"),
    ("exploding-head", "flat"),
    ("large-blue-diamond", "fluent"),
    ("lizard", "twemoji"),
    ("pineapple", "noto"),
)
