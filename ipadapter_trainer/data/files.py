"""Files of a data set: members of tar archives, text files, and what is wrong with a file of another type."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ipadapter_core import file_types
from ipadapter_core.file_types import START, FileType, type_of

from ..errors import DataError

IMAGES = (file_types.PNG, file_types.JPEG, file_types.GIF, file_types.RIFF)
ARCHIVES = (file_types.TAR, file_types.GZIP)
ARRAYS = (file_types.NUMPY, file_types.ZIP, file_types.SAFETENSORS)  # torch and .npz files are zip archives


@dataclass(frozen=True)
class TarMember:
    """A file in a tar archive: its bytes, or where an archive on disk that is not compressed holds them. It is opened
    and read as a `Path` is.
    """

    archive: Path
    member: str
    offset: int = 0
    size: int = 0
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"

    @property
    def suffix(self) -> str:
        """As that of a path."""
        return Path(self.member).suffix

    def read_bytes(self) -> bytes:
        """Raises OSError when the archive cannot be read, DataError when it ends too early."""
        if self.content is not None:
            return self.content
        # Opened for each read: workers and threads must not share a position in the file.
        with self.archive.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise DataError(
                f"{self}: cut off after {len(content):,} of {self.size:,} bytes. Make or download the archive again."
            )
        return content

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its bytes as an open file."""
        return io.BytesIO(self.read_bytes())


def fault(start: bytes, expected: str, types: Collection[FileType] = ()) -> str:
    """Why a file with these first bytes cannot be read as `expected`, and what to do. A file of one of the expected
    `types`, or of an unknown type, is damaged.
    """
    found, advice = type_of(start), "Download or make it again."
    if found is None or found in types:
        return f"cannot be read as {expected}. {advice}"
    return f"{found.name}; expected {expected}. {found.advice or advice}"


def wrong_file(file: Path | TarMember, expected: str, types: Collection[FileType] = ()) -> DataError:
    """The error that names such a file."""
    return DataError(f"{file}: {fault(first_bytes(file), expected, types)}")


def first_bytes(file: Path | TarMember) -> bytes:
    """What `type_of` needs of a file; empty for a file that cannot be opened."""
    try:
        with file.open("rb") as stream:
            return stream.read(START)
    except OSError:
        return b""


def read_text(file: Path | TarMember, expected: str) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark, as Windows writes it.

    Raises DataError for other bytes, and for a Git LFS pointer or a web page, which would be read as text.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    if type_of(data[:START]) in (file_types.LFS_POINTER, file_types.WEB_PAGE):
        raise wrong_file(file, expected)
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start:,}"
        raise DataError(f"{file}: not UTF-8 text ({found}). Save it as UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{file}: holds zero bytes: damaged, or UTF-16 without a byte order mark. Save it as UTF-8.")
    return text


def whole_text(text: str, what: str, *, is_name: bool = False) -> str:
    """The text if it encodes as UTF-8; the name of a file may hold other bytes (surrogateescape). JSON can hold text
    that does not: one of the two surrogates of an emoji.

    Raises DataError, which calls the text `what`.
    """
    try:
        text.encode("utf-8", "surrogateescape" if is_name else "strict")
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise DataError(
            f"{what} is not UTF-8 text: {found} at position {error.start:,} is half of an emoji, or a byte of another "
            "encoding. Correct it."
        ) from None
    return text
