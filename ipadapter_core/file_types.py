"""What a file is, by its first bytes, and the sentence for a file that is not what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .errors import AdapterError


class FileType(NamedTuple):
    """`name` is for messages ("a PNG image"); `is_failed_download` is true of what is left when a download failed."""

    name: str
    is_failed_download: bool = False


SAFETENSORS = FileType("a safetensors file")
ZIP = FileType("a PyTorch file or another zip archive")
PICKLE = FileType("a PyTorch file of the old format or another pickle")
JSON = FileType("a JSON file")

_MAGIC: tuple[tuple[bytes, FileType], ...] = (
    (b"version https://git-lfs", FileType("a Git LFS pointer, not the file itself", is_failed_download=True)),
    (b"<", FileType("a web page, not the file itself", is_failed_download=True)),
    (b"{", JSON),
    (b"PK\x03\x04", ZIP),
    (b"\x80", PICKLE),
    (b"\x93NUMPY", FileType("a NumPy array")),
    (b"\x89PNG", FileType("a PNG image")),
    (b"\xff\xd8\xff", FileType("a JPEG image")),
    (b"GIF8", FileType("a GIF image")),
    (b"RIFF", FileType("a WebP image or another RIFF file")),
    (b"GGUF", FileType("a GGUF model")),
)
_START = 64  # bytes


def file_type(path: Path) -> FileType:
    """What a file is, by its first bytes. Raises OSError when it cannot be read."""
    with path.open("rb") as stream:
        start = stream.read(_START)
    if not start:
        return FileType("empty (0 bytes)", is_failed_download=True)
    if not start.strip(b"\0"):
        return FileType("not a model (it starts with zero bytes)", is_failed_download=True)
    # Before the magic numbers: the length of the header comes first, and its low byte may be any of theirs. Eight
    # printable characters would be a length beyond all limits.
    if start[8:9] == b"{" and not _is_text(start[:8]):
        return SAFETENSORS
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, found in _MAGIC:
        if text.startswith(magic):
            return found
    if _is_text(start):  # what servers answer instead: "Entry not found", "Access to model ... is restricted"
        return FileType(f"a text file that begins with {start.decode()!r}", is_failed_download=True)
    return FileType(f"neither safetensors nor a PyTorch file (it starts with {start[:8]!r})")


def unexpected_type(path: Path, expected: str, source: str = "") -> AdapterError:
    """The error for a file that is something else than `expected`; `source` is where to download it from."""
    found = file_type(path)
    advice = download_again(source) if found.is_failed_download else "Choose another file."
    return AdapterError(f"{path}: {found.name}; expected {expected}. {advice}")


def download_again(source: str = "") -> str:
    """The advice for a broken file."""
    return f"Download it again from {source}." if source else "Download it again."


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
