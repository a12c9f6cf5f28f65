"""A file inside a local tar file, read without the others."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True)
class PackedFile:
    """`size` bytes from `offset` on in `archive`, which is not compressed."""

    archive: Path
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"

    @property
    def suffix(self) -> str:
        """Of its name, as a path's."""
        return Path(self.member).suffix

    def read(self) -> bytes:
        """All of it. Raises OSError when the archive cannot be read, DataError when it ends before."""
        # Opened for each read: workers and threads must not share a position in the file.
        with self.archive.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise DataError(
                f"{self}: cut off after {len(content):,} of {self.size:,} bytes. Make or download the archive again."
            )
        return content

    def open(self) -> io.BytesIO:
        """Its bytes as an open file."""
        return io.BytesIO(self.read())
