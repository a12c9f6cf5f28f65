"""Which WebDataset shards a pattern names: tar files, local or by URL."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
import urllib.parse
import zlib
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from ..errors import DataError
from .files import ARCHIVES, fault, first_bytes

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_NAMED = 5  # files in a message


def is_shards(data: str | Path | Sequence[str]) -> bool:
    """Whether a data set is given as shards, not as a folder or a list of images."""
    return not isinstance(data, str | Path) or _path(str(data)).endswith(SHARD_SUFFIXES)


def expand_shards(data: str | Path | Sequence[str]) -> list[str]:
    """The shards that a pattern names: "images-{000..099}.tar", a path or an http(s) URL, "images-*.tar", several
    of them joined by "::", or a list of such.

    Raises DataError for another scheme ("pipe:" would run a program), for names without a shard's suffix, and for local
    files that do not exist or are no archives.
    """
    patterns = [str(data)] if isinstance(data, str | Path) else [str(entry) for entry in data]
    if os.name == "nt":
        patterns = [pattern.replace("\\", "/") for pattern in patterns]  # a backslash would escape a brace
    try:
        names = [name for pattern in patterns for part in pattern.split("::") for name in braceexpand(part)]
    except ValueError as error:
        raise DataError(f"{data}: not a pattern of shards ({error}). Write images-{{000..099}}.tar.") from error
    if not names:
        raise DataError("No shards are given. Set data to something like images-{000..099}.tar.")
    shards = [file for name in names for file in _matches(name)]
    local = [Path(shard) for shard in shards if not is_url(shard)]
    missing = [shard for shard in local if not shard.is_file()]
    if missing:
        count = f"({len(missing)} of {len(shards)} shards do not exist)"
        raise DataError(f"{missing[0]}: no such file {count}. {_shards_in(missing[0].parent)}")
    faults = [f"{shard}: {reason}" for shard in local if (reason := _archive_fault(shard)) is not None]
    if faults:
        count = "" if len(faults) == 1 else f" ({len(faults)} of {len(shards)} shards are no archives.)"
        raise DataError(f"{' '.join(faults[:_NAMED])}{count}")
    return shards


def fingerprint_shards(shards: Sequence[str]) -> str:
    """16 hex digits of the shards' names, and the sizes of local ones: it tells data sets apart."""
    digest = hashlib.sha256()
    for shard in shards:
        size = "" if is_url(shard) else Path(shard).stat().st_size
        digest.update(f"{shard_name(shard)} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def shard_name(shard: str) -> str:
    """The file's name without its folder."""
    return _path(shard).replace("\\", "/").rsplit("/", 1)[-1]


def is_url(shard: str) -> bool:
    """Whether a shard is not on this machine."""
    return shard.startswith(("http://", "https://"))


def is_plain(shard: str) -> bool:
    """Whether a shard's files can be opened alone: a local file that is not compressed."""
    return shard.endswith(".tar") and not is_url(shard)


def _path(shard: str) -> str:
    """A URL without its query."""
    return urllib.parse.urlsplit(shard).path if is_url(shard) else shard


def _matches(name: str) -> list[str]:
    """The files of a pattern with wildcards, in the order of their names; any other name as it is."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", name)  # one letter is a drive
    if scheme and scheme[1] not in ("http", "https"):
        raise DataError(
            f"{name}: shards are read from files and from http and https URLs, not by {scheme[1]!r}. Download "
            "them, or use their https address."
        )
    if not _path(name).endswith(SHARD_SUFFIXES):
        raise DataError(f"{name}: expected a shard ({', '.join(SHARD_SUFFIXES)}).")
    if is_url(name) and "*" in _path(name):
        raise DataError(f"{name}: a pattern of URLs cannot hold a *. Write images-{{000..099}}.tar.")
    if is_url(name) or not glob.has_magic(name) or Path(name).is_file():
        return [name]
    files = sorted(glob.glob(name, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
    if not files:
        raise DataError(f"{name}: no file matches. {_shards_in(Path(name).parent)}")
    return files


def _shards_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}."
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(SHARD_SUFFIXES))
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{folder} holds {', '.join(names[:_NAMED]) or 'no .tar file'}{more}."


def _archive_fault(shard: Path) -> str | None:
    """Why a local shard cannot be opened, by its first header."""
    try:
        tarfile.open(shard).close()
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return fault(first_bytes(shard), "a tar archive", ARCHIVES)
    return None
