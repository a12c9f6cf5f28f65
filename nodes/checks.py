"""Checks before sampling: image prompts that would have no effect, or are for another adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

from ..ipadapter_core import AdapterError, Scaling, Site
from ..ipadapter_core.attention import C_PENALTY_DIM
from ..ipadapter_core.tensors import check_weights
from .types import ImagePrompt, LoadedAdapter

_MIN_DIM = 320  # channels of the smallest layers of SD1.5
_sound_encoders: WeakSet[nn.Module] = WeakSet()


def check_prompt(ip_adapter: LoadedAdapter, image_prompt: ImagePrompt) -> None:
    """Raises AdapterError for a prompt of another adapter, by file name and by features."""
    if image_prompt.adapter not in (ip_adapter.name, None):
        raise AdapterError(
            f"The image prompt was encoded with {image_prompt.adapter}, the connected adapter is {ip_adapter.name}. "
            "Connect the same Load IP Adapter to both nodes."
        )
    for images in (image_prompt.positive, image_prompt.negative):
        try:
            if images is not None:
                ip_adapter.adapter.check_features(*images.features)
        except AdapterError as error:
            known = ", though it was encoded for a file of that name" if image_prompt.adapter else ""
            raise AdapterError(
                f"The image prompt does not fit {ip_adapter.name}{known}. {error} Load the adapter that it was made "
                "with, or encode the images again with this one."
            ) from error


def largest(weights: Iterable[float]) -> float:
    """The largest magnitude of some weights; NaN or infinity when one of them is."""
    magnitudes = [abs(weight) for weight in weights]
    return next((weight for weight in magnitudes if not math.isfinite(weight)), max(magnitudes, default=0.0))


def check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise AdapterError(f"weight is {strength}. Choose a number from -1 to 5; 0 switches the image prompt off.")


def check_acts(strength: float, start_at: float, end_at: float, scaling: Scaling, sites: Sequence[Site]) -> None:
    """Refuse an empty window, and a scaling that leaves almost nothing. Strength 0 is allowed: it is off."""
    if strength == 0.0:
        return
    if not start_at < end_at:
        raise AdapterError(
            f"start_at {start_at:g} is not below end_at {end_at:g}, so the image prompt would act in no step. Change "
            "one of them, or set weight to 0 to switch it off."
        )
    max_dim = max(site.dim for site in sites)
    if "C penalty" in scaling and max_dim < _MIN_DIM:
        raise AdapterError(
            f"embeds_scaling {scaling!r} multiplies the weight by channels / {C_PENALTY_DIM}. The layers of this "
            f"model have at most {max_dim} channels, so at most {max_dim / C_PENALTY_DIM:.0%} of the weight would be "
            "left. Use 'V only' or 'K+V'."
        )


def check_encoder(encoder: Any, name: str) -> None:
    """Refuse an image encoder with damaged weights; each encoder is checked once. `name` is its file's.

    The projection is not checked: encoders for plus adapters may lack it, and `encode` checks its output. Nor is
    DINO's mask token, which may be zero and is not used.
    """
    model = getattr(encoder, "model", None)
    if not isinstance(model, nn.Module) or model in _sound_encoders:
        return
    if encoder.image_size <= 0 or ("DINOv3" in type(model).__name__ and not model._forward_hooks):
        raise AdapterError(f"{name} ({type(model).__name__}) needs Load IP Adapter: choose its file there.")
    unused = ("visual_projection.", "embeddings.mask_token")
    weights = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(unused)}
    check_weights(weights, name)
    _sound_encoders.add(model)
