"""Files of a data set that are not what their names promise, and text files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ipadapter_core.file_types import (
    GIF,
    GZIP,
    JPEG,
    LFS_POINTER,
    NUMPY,
    PNG,
    RIFF,
    SAFETENSORS,
    START,
    TAR,
    WEB_PAGE,
    ZIP,
    FileType,
    type_of,
)

from ..errors import DataError

IMAGES = (PNG, JPEG, GIF, RIFF)
ARCHIVES = (TAR, GZIP)
ARRAYS = (NUMPY, ZIP, SAFETENSORS)  # torch and .npz files are zip archives


def fault(start: bytes, expected: str, kinds: Collection[FileType] = ()) -> str:
    """What is wrong with a file that cannot be read as what was `expected`, and what to do. A file of one of the
    expected `kinds`, or of an unknown one, is damaged.
    """
    found, advice = type_of(start), "Download or make it again."
    if found is None or found in kinds:
        return f"cannot be read as {expected}. {advice}"
    return f"{found.name}; expected {expected}. {found.advice or advice}"


def wrong_file(name: object, start: bytes, expected: str, kinds: Collection[FileType] = ()) -> DataError:
    """The error that names such a file."""
    return DataError(f"{name}: {fault(start, expected, kinds)}")


def first_bytes(file: Path) -> bytes:
    """What `type_of` needs of a file; nothing for one that cannot be opened."""
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
    if type_of(data[:START]) in (LFS_POINTER, WEB_PAGE):
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
