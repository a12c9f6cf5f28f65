"""The concepts with a part of their own: those asked for by text, and the image prompts that ComfyUI offers."""

from __future__ import annotations

# (concept, style) of the held-out images that Load IP Adapter Demo offers: no model has seen them.
PROMPT_IMAGES = (
    ("crab", "fluent"),
    ("desert-island", "fxemoji"),
    ("exploding-head", "flat"),
    ("large-blue-diamond", "fluent"),
    ("lizard", "twemoji"),
    ("pineapple", "noto"),
)
