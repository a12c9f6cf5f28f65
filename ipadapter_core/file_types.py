"""The type of a file by its first bytes, and the error for an unexpected one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .errors import AdapterError


class FileType(NamedTuple):
    """`name` is for messages ("a PNG image"). `is_failed_download`: typically the result of a failed download.
    `advice`: what to do with such a file, if not to choose another one.
    """

    name: str
    is_failed_download: bool = False
    advice: str = ""


SAFETENSORS = FileType("a safetensors file")
ZIP = FileType("a PyTorch file or another zip archive")
PICKLE = FileType("a PyTorch file of the old format or another pickle")
NUMPY = FileType("a NumPy array")
JSON = FileType("a JSON file")
TAR, GZIP = FileType("a tar archive"), FileType("a gzip archive")
PNG, JPEG, GIF = FileType("a PNG image"), FileType("a JPEG image"), FileType("a GIF image")
RIFF = FileType("a WebP image or another RIFF file")
EMPTY = FileType("an empty file (0 bytes)", is_failed_download=True)
ZEROS = FileType("a file of zero bytes", is_failed_download=True)
WEB_PAGE = FileType("a web page, not the file itself", is_failed_download=True)
LFS_POINTER = FileType(
    "a Git LFS pointer, not the file itself",
    is_failed_download=True,
    advice="Download it again; in a git repository with `git lfs pull`.",
)

DOWNLOAD_AGAIN = "Download it again."  # the advice for a broken file
_CONVERT = "Convert it to JPEG or PNG."
_STARTS: tuple[tuple[bytes, FileType], ...] = (
    (rb"version https://git-lfs", LFS_POINTER),
    (rb"(?i)<(!doctype html|html|head)", WEB_PAGE),
    (rb"(<\?xml[^>]*>\s*)?<svg", FileType("an SVG drawing", advice=_CONVERT)),
    (rb"<", FileType("an XML document, not the file itself", is_failed_download=True)),
    (rb"\{", JSON),
    (rb"PK\x03\x04", ZIP),
    (rb"\x80", PICKLE),
    (rb"\x93NUMPY", NUMPY),
    (rb"\x89PNG", PNG),
    (rb"\xff\xd8\xff", JPEG),
    (rb"GIF8", GIF),
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", FileType("a HEIC image", advice=_CONVERT)),
    (rb"RIFF", RIFF),
    (rb"GGUF", FileType("a GGUF model")),
    (rb"%PDF", FileType("a PDF document", advice=_CONVERT)),
    (rb"\x1f\x8b", GZIP),
)
START = 512  # bytes that `type_of` looks at: those of the header of a tar archive
_SHOWN = 48  # characters of a text


def type_of(start: bytes) -> FileType | None:
    """The type of a file with these first bytes; None for an unknown one."""
    if not start.strip(b"\0"):
        return ZEROS if start else EMPTY
    # First, because the length of the header may start with the bytes of any other type. Eight printable characters
    # would be a length beyond all limits.
    if start[8:9] == b"{" and not _is_text(start[:8]):
        return SAFETENSORS
    if start[257:262] == b"ustar":
        return TAR
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, found in _STARTS:
        if re.match(pattern, text, re.DOTALL):
            return found
    if _is_text(start):  # what servers answer instead: "Entry not found", "Access to model ... is restricted"
        return FileType(f"a text file that begins with {start.decode()[:_SHOWN]!r}", is_failed_download=True)
    return None


def file_type(path: Path) -> FileType:
    """The type of a file. Raises OSError when it cannot be read."""
    with path.open("rb") as stream:
        start = stream.read(START)
    return type_of(start) or FileType(f"neither safetensors nor a PyTorch file (it starts with {start[:8]!r})")


def unexpected_type(path: Path, expected: str, advice: str = DOWNLOAD_AGAIN) -> AdapterError:
    """The error for a file that is something else than `expected`; `advice` is what to do with a broken one."""
    found = file_type(path)
    if found.advice and advice == DOWNLOAD_AGAIN:
        advice = found.advice
    elif not found.is_failed_download:
        advice = "Choose another file."
    return AdapterError(f"{path}: {found.name}; expected {expected}. {advice}")


def download_again(source: str) -> str:
    """The advice for a broken file that is published on the page `source`."""
    return f"Download it again from {source}."


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
