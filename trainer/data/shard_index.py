"""Local WebDataset shards as examples: the tar headers say where every file lies, so that any sample can be opened
alone, as a feature cache and the training from it need.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from .examples import Example
from .packed import PackedFile
from .shard_files import PICTURE_KEYS, caption_of, import_webdataset, is_url, picture_of, shard_name

FACE = "face.npy"

log = logging.getLogger(__name__)

Files = dict[str, PackedFile]  # of a sample, by their suffixes


def index_shards(shards: Sequence[str]) -> list[Example]:
    """The samples of local .tar files, in their order, as examples; captions are read, pictures are not.

    Samples without a picture or a caption, and what lies behind a damaged place of a shard, are left out with a
    warning. Raises DataError for a URL and a compressed shard, in which nothing can be opened alone, and when nothing
    is left.
    """
    examples: list[Example] = []
    problems: list[str] = []
    for shard in shards:
        if is_url(shard) or not shard.endswith(".tar"):
            what = "an address" if is_url(shard) else "compressed"
            raise DataError(
                f"{shard} is {what}: a cache is made from .tar files on this machine. Download or unpack it first."
            )
        try:
            for key, files in _samples(Path(shard)):
                try:
                    examples.append(_example(f"{shard_name(shard)}/{key}", files))
                except DataError as error:
                    problems.append(str(error))
        except (OSError, tarfile.TarError) as error:
            problems.append(f"{shard}: {type(error).__name__}: {error}")
    if not examples:
        raise DataError(f"The shards hold no sample. {problems[0] if problems else f'The first is {shards[0]}.'}")
    if problems:
        log.warning(
            "%d of %d samples are left out, such as %s", len(problems), len(problems) + len(examples), problems[0]
        )
    return examples


def _samples(shard: Path) -> Iterator[tuple[str, Files]]:
    """The files of each sample; neighbours with one name belong together, as webdataset groups them."""
    split = import_webdataset().tariterators.base_plus_ext
    current, files = None, Files()
    with tarfile.open(shard, "r:") as tar:
        for info in tar:
            key, suffix = split(info.name)
            if key is None or not info.isreg() or re.match(r"__[^/]*__($|/)", info.name):
                continue
            if key != current:
                if current is not None:
                    yield current, files
                current, files = key, Files()
            files.setdefault(suffix.lower(), PackedFile(shard, info.name, info.offset_data, info.size))
    if current is not None:
        yield current, files


def _example(name: str, files: Files) -> Example:
    texts = {suffix: files[suffix].read() for suffix in ("txt", "json") if suffix in files}
    return Example(
        picture_of(files, name),
        caption_of(texts, name),
        tuple(files[f"reference.{key}"] for key in PICTURE_KEYS if f"reference.{key}" in files),
        files.get(FACE),
    )
