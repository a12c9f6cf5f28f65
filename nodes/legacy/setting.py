"""The one setting of the old names: the images of ComfyUI_IPAdapter_plus, or what its nodes were meant to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import folder_paths

FILE = "ip-adapter-kit.json"  # in ComfyUI's user directory
KEY = "old_names"
SAME, CORRECTED = "same images", "corrected"

_log = logging.getLogger("ip_adapter_kit")


def mode() -> str:
    """`SAME` unless user/ip-adapter-kit.json holds {"old_names": "corrected"}."""
    path = Path(folder_paths.get_user_directory()) / FILE
    if not path.is_file():
        return SAME
    try:
        # From bytes, json finds out UTF-8 and UTF-16, with the mark at the start that Windows' editors write.
        value = json.loads(path.read_bytes()).get(KEY, SAME)
    except (OSError, ValueError, AttributeError) as error:
        _log.warning('%s: cannot be read (%s). Expected {"%s": "%s"}.', path, error, KEY, CORRECTED)
        return SAME
    if value not in (SAME, CORRECTED):
        _log.warning("%s: %s is %r. Use %r or %r.", path, KEY, value, SAME, CORRECTED)
        return SAME
    return value


def is_corrected() -> bool:
    """Whether the middle block gets the image prompt, and the negative of plus adapters is that of their training."""
    return mode() == CORRECTED
