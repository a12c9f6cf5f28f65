"""Names that a user gives to files."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

from ..ipadapter_core import AdapterError

# What Windows has no file name for, or takes for something else than a file; half characters, which no file name holds.
_UNUSABLE = re.compile(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_SHOWN = 80


def relative_name(text: str, name: str, folder: str) -> PurePosixPath:
    """A name that the user gave, maybe with folders before it, as a path below `folder` that every system takes. `name`
    is that of the input, for messages.

    Raises AdapterError for a name that leads elsewhere, or that is none.
    """
    advice = "Use a name such as portraits/anna."
    text = text.strip()
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".")]
    if ".." in parts or PureWindowsPath(text).anchor:
        raise AdapterError(f"{name} {text[:_SHOWN]!r} leads out of {folder}. {advice}")
    if not parts or text[-1] in "/\\.":
        raise AdapterError(f"{name} {text[:_SHOWN]!r} names no file. {advice}")
    for part in parts:
        found = _UNUSABLE.search(part)
        if found:
            raise AdapterError(f"{name} {text[:_SHOWN]!r} holds {found.group()!r}, which file names cannot. {advice}")
        if _DEVICES.match(part) or part[-1] in ". ":
            raise AdapterError(f"{name} {text[:_SHOWN]!r} holds {part[:_SHOWN]!r}, which Windows cannot name. {advice}")
    return PurePosixPath(*parts)
