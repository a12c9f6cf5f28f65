"""The samples of WebDataset shards: neighbouring files in a tar archive with one name and several suffixes.

A sample is an image (.jpg, .png, .webp, ...) with its caption (.txt, or "text" or "caption" in .json), and
optionally another prompt image (.reference.jpg and so on) and a face embedding (.face.npy).
"""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from ipadapter_core.file_types import TAR, ZEROS, type_of

from ..errors import DataError
from .examples import Example
from .files import TarMember, first_bytes, read_text, whole_text
from .http_file import HttpFile
from .images import IMAGE_SUFFIXES
from .shard_files import is_plain, is_url, shard_name

FACE_SUFFIX = "face.npy"
SHUFFLED = 256  # samples of a shard, still encoded, that are held in memory to shuffle them
_PADDING = 1 << 16  # bytes; writers fill the last block, usually of 10 KB, with zeros
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # the name of a sample and the suffix, which may hold dots
_META = re.compile(r"__[^/]*__($|/)")  # files about the shard

_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError)

log = logging.getLogger(__name__)


class TarSample(NamedTuple):
    """A sample with its files still encoded."""

    name: str  # shard/sample
    files: dict[str, TarMember]  # by suffix, without the first dot

    def example(self) -> Example:
        """Raises DataError for a sample without an image or a caption, and for a misspelt reference or face."""
        images = [self.files[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in self.files]
        if not images:
            raise DataError(f"{self.name}: no image (jpg, png, webp, ...) among its files ({', '.join(self.files)}).")
        for suffix in self.files:
            start, _, rest = suffix.partition(".")
            meant = "face" if rest == "npy" else "reference" if f".{rest}" in IMAGE_SUFFIXES else ""
            if start != meant and start.isalpha() and difflib.get_close_matches(start, [meant], cutoff=0.85):
                raise DataError(f"{self.name}: .{suffix} is not read. Did you mean .{meant}.{rest}?")
        references = [f"reference{suffix}" for suffix in IMAGE_SUFFIXES if f"reference{suffix}" in self.files]
        return Example(
            images[0],
            self._caption(),
            tuple(self.files[reference] for reference in references),
            self.files.get(FACE_SUFFIX),
        )

    def _caption(self) -> str:
        if "txt" in self.files:
            return read_text(self.files["txt"], "a caption").strip()
        try:
            row = json.loads(read_text(self.files["json"], "a caption")) if "json" in self.files else {}
        except json.JSONDecodeError as error:
            raise DataError(f"{self.name}: its caption cannot be read ({error}).") from error
        for key in ("text", "caption"):
            if isinstance(row, dict) and isinstance(row.get(key), str):
                return whole_text(row[key], f"{self.name}: {key!r}").strip()
        raise DataError(f"{self.name}: no caption: no .txt, and no 'text' or 'caption' in a .json.")


def stream_samples(shard: str, report: Callable[[str], None], seed: str | None = None) -> Iterator[TarSample]:
    """The samples of a shard, a file or a URL, with the bytes of their files; slightly shuffled when there is a seed.

    A shard that is damaged or missing ends early, and `report` gets the reason. Raises DataError when a server cannot
    be reached.
    """
    samples = _read_samples(shard, report)
    if seed is None:
        yield from samples
        return
    rng = random.Random(seed)
    while chunk := list(islice(samples, SHUFFLED)):
        rng.shuffle(chunk)
        yield from chunk


def _read_samples(shard: str, report: Callable[[str], None]) -> Iterator[TarSample]:
    archive = Path(shard_name(shard))

    def read(info: tarfile.TarInfo) -> TarMember:
        content = tar.extractfile(info)
        assert content is not None  # only for links and folders
        return TarMember(archive, info.name, content=content.read())

    try:
        stream = HttpFile(shard) if is_url(shard) else Path(shard).open("rb")  # noqa: SIM115, closed below
    except OSError as error:
        report(f"{shard}: cannot be opened ({error}).")
        return
    with stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                yield from _samples(tar, shard, read, report)
                _check_end(tar, shard)
        except _DAMAGED as error:
            report(_damaged(shard, error))


def index_shards(shards: Sequence[str]) -> list[Example]:
    """The samples of local .tar files, in their order, as examples that can be opened alone, as a cache needs them.
    Captions are read, images are not.

    Samples without an image or a caption, and what follows a damaged part of a shard, are left out with a warning.
    Raises DataError for a URL, for a compressed shard, and when nothing is left.
    """
    examples: list[Example] = []
    problems: list[str] = []
    damaged: list[str] = []
    for shard in shards:
        if not is_plain(shard):
            what = "a URL" if is_url(shard) else "compressed"
            raise DataError(
                f"{shard} is {what}: a cache is made from .tar files on this machine. Download or unpack it first."
            )
        try:
            for sample in _index(shard, problems.append):
                try:
                    examples.append(sample.example())
                except DataError as error:
                    problems.append(str(error))
        except _DAMAGED as error:
            damaged.append(_damaged(shard, error))
    if not examples:
        raise DataError(f"The shards hold no sample. {(damaged + problems + [f'The first is {shards[0]}.'])[0]}")
    if damaged:
        log.warning("%d of %d shards end early, such as %s", len(damaged), len(shards), damaged[0])
    if problems:
        count = len(problems) + len(examples)
        log.warning("%d of %d samples are left out, such as %s", len(problems), count, problems[0])
    return examples


def count_samples(shard: str) -> int | None:
    """How many samples `stream_samples` gives, from the tar headers alone; None for a shard that has to be read."""
    try:
        return sum(1 for _ in _index(shard, lambda problem: None)) if is_plain(shard) else None
    except _DAMAGED:
        return None


def _index(shard: str, report: Callable[[str], None]) -> Iterator[TarSample]:
    """The samples of a local .tar file, with the offsets of their files."""
    path = Path(shard)
    with tarfile.open(path, "r:") as tar:
        yield from _samples(tar, shard, lambda info: TarMember(path, info.name, info.offset_data, info.size), report)
        _check_end(tar, shard)


def _samples(
    tar: tarfile.TarFile,
    shard: str,
    open_member: Callable[[tarfile.TarInfo], TarMember],
    report: Callable[[str], None],
) -> Iterator[TarSample]:
    matches = ((_NAME.fullmatch(info.name), info) for info in tar if info.isreg() and not _META.match(info.name))
    members = ((match[1], match[2].lower(), info) for match, info in matches if match is not None)
    for name, group in groupby(members, key=itemgetter(0)):
        files: dict[str, TarMember] = {}
        repeated = ""
        for _, suffix, info in group:
            if suffix in files:
                repeated = suffix
            else:
                files[suffix] = open_member(info)
        sample = TarSample(f"{shard_name(shard)}/{name}", files)
        if repeated:
            report(f"{sample.name}: more than one .{repeated}; the first is read. Give each sample a name of its own.")
        yield sample


def _check_end(tar: tarfile.TarFile, shard: str) -> None:
    """Raises ReadError for an archive that was read without an error, but has no end marker, or that is a local file
    and goes on after it.
    """
    assert tar.fileobj is not None
    if tar.fileobj.tell() - tar.offset < tarfile.BLOCKSIZE:  # tarfile ends without an error where the data do
        raise tarfile.ReadError("it has no end marker")
    if not is_plain(shard) or type_of(first_bytes(Path(shard))) not in (TAR, ZEROS):  # compressed, whatever its name
        return
    size = Path(shard).stat().st_size
    if size - tar.offset > _PADDING:  # readers stop at zeros
        raise tarfile.ReadError(
            f"it ends after {tar.offset:,} of {size:,} bytes: an incomplete download, or several archives in one"
        )


def _damaged(shard: str, error: Exception) -> str:
    return f"{shard}: cut off or damaged ({error}). Download or make it again."
