"""The one exception type of the library."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter file, an image feature or a model that does not fit the others.

    The message names the thing, what it holds, what was expected (both numbers) and what to do next,
    so that a host can show it to the user as it is.
    """


# Hosts print where a class lives before its message; under ComfyUI that would be a long path, twice.
AdapterError.__module__ = "ipadapter_core"
