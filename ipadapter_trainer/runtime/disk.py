"""Atomic files, and errors of the disk as messages for users."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OS_ERROR = re.compile(r"os error (\d+)|code: (\d+)")  # how Rust's libraries write the error number


@contextmanager
def disk_errors(path: Path, need: int | None = None, kept: str = "") -> Iterator[None]:
    """Turn the error of a full or read-only disk into a DiskError that names `path`, the bytes it needs and those that
    are free. `kept` is appended to the advice: what is not lost.

    Libraries report a full disk as an OSError without a file name, a SafetensorError, or (PyTorch) a RuntimeError with
    the OSError in its context. If nested, the error names the outermost path, which is the one users know.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, DiskError) as error:
        number = _error_number(error)
        if number is None:
            raise
        raise _disk_error(path, number, need, kept) from error


@contextmanager
def whole_file(path: Path, need: int | None = None, kept: str = "") -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`, which is renamed to `path` after all is written; after an error
    or an interruption it is deleted. Raises DiskError.
    """
    # Keep the suffix: Pillow takes the image format from it.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp{path.suffix}")
    with disk_errors(path, need, kept):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def show_bytes(count: float) -> str:
    """Such as "65.5 KB", in powers of a thousand."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def _error_number(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if isinstance(error, SafetensorError) and (found := _OS_ERROR.search(str(error))):
            return int(found[1] or found[2])
        error = error.__cause__ or error.__context__
    return None


def _disk_error(path: Path, number: int, need: int | None, kept: str) -> DiskError:
    reason = os.strerror(number)
    if number in _FULL:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        reason = "no space left on the disk" if number == errno.ENOSPC else reason
        sizes = [] if need is None else [f"needs {show_bytes(need)}"]
        reason += f" ({', '.join([*sizes, f'{show_bytes(shutil.disk_usage(place).free)} free'])})"
        advice = "Free some space and run the same command again"
    elif number in _FORBIDDEN:
        advice = "Choose a folder that can be written to"
    else:
        advice = "Check the disk and the path"
    return DiskError(f"{path}: {reason}", f"{advice}{f'; {kept}' if kept else ''}")
