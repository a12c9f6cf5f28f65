"""WebDataset shards: tar files, local or by URL, whose files with one name and several suffixes are a sample.

A sample is an image (.jpg, .png, .webp, ...) with its caption (.txt, or "text" or "caption" in .json), and
optionally another prompt image (.reference.jpg and so on) and a face embedding (.face.npy).
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import random
import re
import tarfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ipadapter_core.file_types import TAR, ZEROS, type_of

from ..errors import DataError
from .file_kinds import ARCHIVES, fault, first_bytes
from .images import IMAGE_SUFFIXES
from .url_stream import UrlStream

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_KEYS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
FACE_KEY = "face.npy"
_NAMED = 5  # files in a message
_PADDING = 1 << 16  # bytes; writers fill the last block, of 10 KB as a rule, with zeros
SHUFFLED = 256  # samples of a shard that are held, undecoded, to shuffle them

T = TypeVar("T")
RawSample = dict[str, Any]  # "__key__", "__url__", and the bytes of each file by its suffix


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample with its images still encoded."""

    name: str  # shard/key
    image: bytes
    text: str
    references: tuple[bytes, ...] = ()
    face_id_embed: Tensor | None = None


def is_shards(data: str | Path | Sequence[str]) -> bool:
    """Whether a data set is given as shards, and not as a folder or a list of images."""
    return not isinstance(data, str | Path) or _suffix(str(data)).endswith(SHARD_SUFFIXES)


def expand_shards(data: str | Path | Sequence[str]) -> list[str]:
    """The shards that a pattern names: "images-{000..099}.tar", a path or an http(s) URL, "images-*.tar", several
    of them joined by "::", or a list of such.

    Raises DataError for another scheme ("pipe:" would run a program), for names without a shard's suffix, and for local
    files that do not exist or are no archives.
    """
    wds = import_webdataset()
    patterns = [str(data)] if isinstance(data, str | Path) else [str(entry) for entry in data]
    if os.name == "nt":
        patterns = [pattern.replace("\\", "/") for pattern in patterns]  # a backslash would escape a brace
    try:
        shards = [shard for pattern in patterns for shard in wds.shardlists.expand_urls(pattern)]
    except (ValueError, AssertionError) as error:  # unbalanced braces, an unknown variable
        raise DataError(f"{data}: not a pattern of shards ({error}). Write images-{{000..099}}.tar.") from error
    if not shards:
        raise DataError("No shards are given. Set data to something like images-{000..099}.tar.")
    for shard in shards:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", shard)  # one letter is a drive
        if scheme and scheme[1] not in ("http", "https"):
            raise DataError(
                f"{shard}: shards are read from files and from http and https URLs, not by {scheme[1]!r}. Download "
                "them, or use their https address."
            )
        if not _suffix(shard).endswith(SHARD_SUFFIXES):
            raise DataError(f"{shard}: expected a shard ({', '.join(SHARD_SUFFIXES)}).")
    shards = [file for shard in shards for file in _matches(shard)]
    local = [Path(shard) for shard in shards if not is_url(shard)]
    missing = [shard for shard in local if not shard.is_file()]
    if missing:
        many = f"({len(missing)} of {len(shards)} shards do not exist)"
        raise DataError(f"{missing[0]}: no such file {many}. {_tars_beside(missing[0])}")
    faults = [f"{shard}: {reason}" for shard in local if (reason := _why_no_archive(shard)) is not None]
    if faults:
        many = "" if len(faults) == 1 else f" ({len(faults)} of {len(shards)} shards are no archives.)"
        raise DataError(f"{' '.join(faults[:_NAMED])}{many}")
    return shards


def _matches(shard: str) -> list[str]:
    """The files of a pattern with wildcards, in the order of their names; another name is left alone."""
    if is_url(shard):
        if "*" in _suffix(shard):
            raise DataError(f"{shard}: a pattern of addresses cannot hold a *. Write images-{{000..099}}.tar.")
        return [shard]
    if not glob.has_magic(shard) or Path(shard).is_file():
        return [shard]
    files = sorted(glob.glob(shard, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
    if not files:
        raise DataError(f"{shard}: no file matches. {_tars_beside(Path(shard))}")
    return files


def _tars_beside(shard: Path) -> str:
    """What shards its folder has."""
    if not shard.parent.is_dir():
        return f"There is no folder {shard.parent}."
    names = sorted(file.name for file in shard.parent.iterdir() if file.name.endswith(SHARD_SUFFIXES))
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{shard.parent} holds {', '.join(names[:_NAMED]) or 'no .tar file'}{more}."


def _why_no_archive(shard: Path) -> str | None:
    """What is wrong with a local shard at first sight: its first header."""
    try:
        tarfile.open(shard).close()
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return fault(first_bytes(shard), "a tar archive", ARCHIVES)
    return None


def fingerprint_shards(shards: Sequence[str]) -> str:
    """16 hex digits of the shards' names, and the sizes of local ones: it tells data sets apart."""
    digest = hashlib.sha256()
    for shard in shards:
        size = "" if is_url(shard) else Path(shard).stat().st_size
        digest.update(f"{shard_name(shard)} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def shard_name(shard: str) -> str:
    """The file's name without its place."""
    return _suffix(shard).replace("\\", "/").rsplit("/", 1)[-1]


def raw_samples(shard: str, report: Callable[[str], None], seed: str | None = None) -> Iterator[RawSample]:
    """The samples of a shard with nothing decoded, slightly shuffled when there is a seed.

    A damaged or missing shard ends early; `report` is told why. Raises DataError when a server cannot be reached.
    """
    wds = import_webdataset()
    failed: list[Exception] = []

    def handler(error: Exception) -> bool:
        if isinstance(error, DataError):
            raise error
        failed.append(error)
        reason = str(error.args[0] if error.args else "").split(" @ ")[0]  # webdataset adds the open file
        if isinstance(error, ValueError):  # a file that comes twice; the rest of the shard is good
            report(f"{shard}: {reason}")
            return True
        report(f"{shard}: cut off or damaged ({reason}); its rest is left out. Download or make it again.")
        return False

    try:
        stream = _open(shard)
    except (OSError, HTTPException) as error:
        report(f"{shard}: {type(error).__name__}: {error}")
        return
    with stream:
        files = wds.tariterators.tar_file_expander([{"url": shard, "stream": stream}], handler=handler)
        samples = wds.tariterators.group_by_keys(files, handler=handler)
        if seed is not None:
            samples = wds.filters.shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(seed))(samples)
        yield from samples
        if not failed and is_plain(shard) and (why := _why_early(Path(shard), stream.tell())) is not None:
            report(f"{shard}: {why}. Download or make it again.")


def count_samples(shard: str) -> int | None:
    """How many samples `raw_samples` gives for an undamaged local file, from the tar headers alone; None when only
    reading all can tell.
    """
    if not is_plain(shard):
        return None
    try:
        files = [(key, suffix) for key, suffix, _ in tar_headers(Path(shard))]
    except (OSError, tarfile.TarError):
        return None
    if len(set(files)) < len(files):
        return None  # a file that comes twice
    return sum(1 for i, (key, _) in enumerate(files) if i == 0 or key != files[i - 1][0])


def tar_headers(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The sample, the suffix and the header of every file that webdataset would read; of neighbours with one sample's
    name it makes a sample. Raises OSError or TarError where the file is damaged.
    """
    split = import_webdataset().tariterators.base_plus_ext
    with tarfile.open(shard, "r:") as tar:
        for info in tar:
            key, suffix = split(info.name)
            if key is not None and info.isreg() and not re.match(r"__[^/]*__($|/)", info.name):
                yield key, suffix.lower(), info
        early = _why_early(shard, tar.offset)
    if early is not None:
        raise tarfile.ReadError(early)


def _why_early(shard: Path, end: int) -> str | None:
    """What is wrong with an archive that was read without an error to `end`: it goes on there, or has no end marker."""
    size = shard.stat().st_size
    if type_of(first_bytes(shard)) not in (TAR, ZEROS):  # compressed, whatever its name
        return None
    if size - end > _PADDING:  # behind zeros, which readers take for the end
        return f"it ends after {end:,} of {size:,} bytes: an incomplete download, or several archives in one"
    with shard.open("rb") as stream:
        stream.seek(-tarfile.BLOCKSIZE, io.SEEK_END)
        return "it has no end marker: cut off" if stream.read().strip(b"\0") else None


def parse_sample(raw: RawSample) -> Sample:
    """Raises DataError for a sample without an image or a caption, or with a face embedding that cannot be read."""
    name = f"{shard_name(raw['__url__'])}/{raw['__key__']}"
    image = image_of(raw, name)
    return Sample(name, image, caption_of(raw, name), references_of(raw), _face(raw, name))


def image_of(files: Mapping[str, T], name: str) -> T:
    """The image among a sample's files by suffix. Raises DataError when there is none."""
    image = next((files[key] for key in IMAGE_KEYS if key in files), None)
    if image is None:
        found = ", ".join(key for key in files if not key.startswith("__"))
        raise DataError(f"{name}: no image (jpg, png, webp, ...) among its files ({found}).")
    return image


def references_of(files: Mapping[str, T]) -> tuple[T, ...]:
    """The other prompt images among a sample's files by suffix."""
    return tuple(files[f"reference.{key}"] for key in IMAGE_KEYS if f"reference.{key}" in files)


def caption_of(files: Mapping[str, bytes], name: str) -> str:
    """The caption in a sample's .txt or .json. Raises DataError when there is none that can be read."""
    try:
        if "txt" in files:
            return files["txt"].decode("utf-8-sig").strip()
        row = json.loads(files["json"]) if "json" in files else {}
    except ValueError as error:
        raise DataError(f"{name}: its caption cannot be read ({error}).") from error
    text = next((row[key] for key in ("text", "caption") if isinstance(row.get(key), str)), None)
    if text is None:
        raise DataError(f"{name}: no caption: no .txt, and no 'text' or 'caption' in a .json.")
    return text.strip()


def import_webdataset() -> Any:
    """Raises DataError when the library is not installed."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise DataError(
            "Shards need the package webdataset. Install it with: pip install 'ip-adapter-kit[train]'"
        ) from error
    return webdataset


def _face(raw: RawSample, name: str) -> Tensor | None:
    if FACE_KEY not in raw:
        return None
    try:
        return torch.from_numpy(np.load(io.BytesIO(raw[FACE_KEY]), allow_pickle=False))
    except Exception as error:
        raise DataError(f"{name}: its face embedding cannot be read ({error}).") from error


def is_url(shard: str) -> bool:
    """Whether a shard is not on this machine."""
    return shard.startswith(("http://", "https://"))


def is_plain(shard: str) -> bool:
    """Whether a shard's files can be found and opened alone: a local file that is not compressed."""
    return shard.endswith(".tar") and not is_url(shard)


def _suffix(shard: str) -> str:
    """A shard's address without what follows the path."""
    return urllib.parse.urlsplit(shard).path if is_url(shard) else shard


def _open(shard: str) -> IO[bytes]:
    return cast("IO[bytes]", UrlStream(shard)) if is_url(shard) else Path(shard).open("rb")
