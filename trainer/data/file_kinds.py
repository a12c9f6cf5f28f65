"""What a file is by its first bytes, for messages about files that are not what their names promise."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import DataError

START = 512  # bytes that `what_is` looks at
IMAGES = ("a PNG image", "a JPEG image", "a GIF image")
ARCHIVES = ("a tar archive", "a gzip archive")
ARRAYS = ("a .npy array", "a zip archive", "a safetensors file")  # torch and .npz files are zip archives
ZEROS = "a file of zeros"
LFS_POINTER, WEB_PAGE = "a Git LFS pointer, not the file itself", "a web page"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", LFS_POINTER),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a .npy array"),
    (b"%PDF", "a PDF document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
)
_ADVICE = {
    LFS_POINTER: "Run `git lfs pull` in its folder.",
    **dict.fromkeys(("a HEIC image", "an SVG drawing", "a PDF document"), "Convert it to JPEG or PNG."),
}
_HTML = re.compile(rb"\s*<(!doctype html|html|head)", re.IGNORECASE)
_HEIC = re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)


def what_is(start: bytes) -> str | None:
    """A noun for a file that starts with these bytes; None for an unknown one."""
    if not start.strip(b"\0"):
        return ZEROS if start else "an empty file"
    if _HTML.match(start):
        return WEB_PAGE
    if _HEIC.match(start):
        return "a HEIC image"
    if start[257:262] == b"ustar":
        return "a tar archive"
    if start[8:9] == b"{":
        return "a safetensors file"
    return next((name for magic, name in _MAGIC if start.startswith(magic)), None)


def fault(start: bytes, expected: str, own: Collection[str] = ()) -> str:
    """What is wrong with a file that cannot be read as what was `expected`, and what to do. A file of its `own` kind,
    or of an unknown one, is damaged.
    """
    found = what_is(start)
    described = f"{found}; expected {expected}"
    if found is None or found in own:
        described = f"cannot be read as {expected}"
    return f"{described}. {_ADVICE.get(found or '', 'Download or make it again.')}"


def wrong_file(name: object, start: bytes, expected: str, own: Collection[str] = ()) -> DataError:
    """The error that names such a file."""
    return DataError(f"{name}: {fault(start, expected, own)}")


def first_bytes(file: Path) -> bytes:
    """What `what_is` needs of a file; nothing for one that cannot be opened."""
    try:
        with file.open("rb") as stream:
            return stream.read(START)
    except OSError:
        return b""


def read_text(file: Path, expected: str) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark, as Windows writes it.

    Raises DataError for other bytes, and for a Git LFS pointer or a web page, which would be read as text.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    if what_is(data[:START]) in (LFS_POINTER, WEB_PAGE):
        raise wrong_file(file, data[:START], expected)
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start:,}"
        raise DataError(f"{file}: not UTF-8 text ({found}). Save it as UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{file}: holds zero bytes, so it is damaged or UTF-16 without its mark. Save it as UTF-8.")
    return text
