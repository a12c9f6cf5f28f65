"""The base class of our nodes: their inputs are checked when they run, connected ones too."""

from __future__ import annotations

import functools
import inspect
import math
from numbers import Integral, Real  # NumPy's as well, which other packs put on a wire
from typing import Any

import numpy as np
from comfy_api.latest import io

from ..ipadapter_core import AdapterError

_NUMBERS = {"INT", "FLOAT"}
_WIDGETS = {*_NUMBERS, "COMBO", "BOOLEAN", "STRING"}
_LISTED = 8  # choices that a message names
NONE = "none: "  # how the one line of a list without a file begins, which goes on with what to do


class Node(io.ComfyNode):
    """A node whose `execute` refuses values that its widgets could not have.

    ComfyUI checks the values of widgets, but not those of connected inputs. Inputs that `validate_inputs` takes are
    left to it, as in ComfyUI.
    """

    @classmethod
    def check_inputs(cls, given: dict[str, Any]) -> None:
        """Raises AdapterError for inputs for which a node has a better message than that a value is missing."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        execute = getattr(cls.__dict__.get("execute"), "__func__", None)
        if execute is not None and not hasattr(execute, "__wrapped__"):  # ComfyUI runs a locked copy of the class
            cls.execute = classmethod(_checked(execute))


def _checked(execute: Any) -> Any:
    signature = inspect.signature(execute)
    more = next((name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD), "")

    @functools.wraps(execute)
    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, *args, **kwargs).arguments
        given.update(given.pop(more, {}))  # numbered inputs, taken as **inputs
        own = inspect.signature(cls.validate_inputs).parameters
        cls.check_inputs(given)
        for entry in cls.define_schema().inputs:
            if given.get(entry.id) is not None and entry.id not in own:
                check_value(entry, given[entry.id])
            elif entry.id in given and given[entry.id] is None and (not entry.optional or entry.io_type in _WIDGETS):
                raise AdapterError(f"{entry.id} is connected to an output that has nothing. Connect another one.")
        return execute(cls, *args, **kwargs)

    return checked


def check_value(entry: Any, value: Any) -> None:
    """Raises AdapterError when a value is none of the choices of an input, no number in its range, or of another type
    than its widget.
    """
    if entry.io_type == "COMBO":
        options = list(entry.options or ())
        choices = [option for option in options if not str(option).startswith(NONE)]
        if choices and value not in options:  # without a file to choose, the node itself names the folder
            listed = ", ".join(map(str, choices[:_LISTED])) + (", ..." if len(choices) > _LISTED else "")
            raise AdapterError(f"{entry.id} is {str(value)[:80]!r}. Choose one of: {listed}.")
    if entry.io_type in _NUMBERS:
        sort, types = ("a whole number", Integral) if entry.io_type == "INT" else ("a number", Real)
        if not isinstance(value, types) or not math.isfinite(value) or not _in_range(entry, value):
            low, high = (f"{end:g}" if isinstance(end, int | float) else "any" for end in (entry.min, entry.max))
            raise AdapterError(f"{entry.id} is {str(value)[:80]}. Choose {sort} from {low} to {high}.")

    if entry.io_type == "BOOLEAN" and not isinstance(value, bool | Integral | np.bool_):
        raise AdapterError(f"{entry.id} is {str(value)[:80]!r}. Connect true or false.")
    if entry.io_type == "STRING" and not isinstance(value, str):
        raise AdapterError(f"{entry.id} is {str(value)[:80]}. Connect a text.")


def _in_range(entry: Any, value: Any) -> bool:
    low = -math.inf if entry.min is None else entry.min
    high = math.inf if entry.max is None else entry.max
    return low <= value <= high
