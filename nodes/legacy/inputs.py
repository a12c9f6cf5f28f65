"""What every old node refuses before it runs: images, masks, EMBEDS and numbers that nothing can be made of. Values
beyond the ranges of widgets, or of 0..1, pass as they did in the old pack.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ipadapter_core import AdapterError
from ...ipadapter_core.image_prompt import check_shape
from ...ipadapter_core.masks import check_finite, mask_planes

_IMAGES = {"image", "image_style", "image_composition", "image_negative", "image_optional"}
_MASKS = {"attn_mask", "mask"}
_EMBEDS = {"pos_embed", "neg_embed", "embeds", *(f"embed{number}" for number in range(1, 6))}
_PARAMS = {"ipadapter_params", *(f"params_{number}" for number in range(1, 6))}


def checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of an old node, whose arguments are checked whoever calls it. Raises AdapterError."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _usable(name, value)
        return method(*bound.args, **bound.kwargs)

    return call


def read_number(text: str) -> float:
    """A number that somebody wrote. Raises ValueError for other text, NaN and infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _usable(name: str, value: Any) -> Any:
    """The value as the node takes it: masks are [M, H, W], images and masks float32 or float64, whatever
    ComfyUI's --fp16-intermediates makes. Lists and IPADAPTER_PARAMS hold such values.
    """
    if isinstance(value, list | tuple):
        return type(value)(_usable(name, one) for one in value)
    if isinstance(value, dict):
        return {key: _usable(key, one) for key, one in value.items()} if name in _PARAMS else value
    if isinstance(value, int | float) and not math.isfinite(value):
        raise AdapterError(f"{name} is {value}. Connect a finite number; 0 switches a weight off.")
    if not isinstance(value, Tensor):
        return value
    if name in _IMAGES | _MASKS and value.dtype not in (torch.float32, torch.float64):
        value = value.float()  # sums over pixels, and convolutions on the CPU, need it
    if name in _MASKS:
        return mask_planes(value, name)
    if name in _IMAGES:
        check_shape(value, name)
    elif name in _EMBEDS and (value.ndim not in (2, 3) or 0 in value.shape):
        raise AdapterError(
            f"{name} has the shape {tuple(value.shape)}. Connect EMBEDS of IPAdapter Encoder or IPAdapter Load Embeds."
        )
    check_finite(value, name)
    return value
