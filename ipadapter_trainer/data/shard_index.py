"""Local WebDataset shards as examples: the tar headers say where every file lies, so that any sample can be opened
alone, as a feature cache and the training from it need.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ..errors import DataError
from .examples import Example
from .shard_files import FACE_KEY, caption_of, image_of, is_plain, is_url, references_of, shard_name, tar_headers
from .tar_member import PackedFile

log = logging.getLogger(__name__)

Files = dict[str, PackedFile]  # of a sample, by their suffixes


def index_shards(shards: Sequence[str]) -> list[Example]:
    """The samples of local .tar files, in their order, as examples; captions are read, images are not.

    Samples without an image or a caption, and what lies behind a damaged place of a shard, are left out with a
    warning. Raises DataError for a URL and a compressed shard, in which nothing can be opened alone, and when nothing
    is left.
    """
    examples: list[Example] = []
    problems: list[str] = []
    early: list[str] = []  # shards
    for shard in shards:
        if not is_plain(shard):
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
            early.append(f"{shard}: cut off or damaged ({error}). Download or make it again.")
    if not examples:
        raise DataError(f"The shards hold no sample. {(early + problems + [f'The first is {shards[0]}.'])[0]}")
    if early:
        log.warning("%d of %d shards end early, such as %s", len(early), len(shards), early[0])
    if problems:
        log.warning(
            "%d of %d samples are left out, such as %s", len(problems), len(problems) + len(examples), problems[0]
        )
    return examples


def _samples(shard: Path) -> Iterator[tuple[str, Files]]:
    """The files of each sample; of two with one suffix the first."""
    for key, headers in groupby(tar_headers(shard), key=itemgetter(0)):
        files: Files = {}
        for _, suffix, info in headers:
            files.setdefault(suffix, PackedFile(shard, info.name, info.offset_data, info.size))
        yield key, files


def _example(name: str, files: Files) -> Example:
    texts = {suffix: files[suffix].read() for suffix in ("txt", "json") if suffix in files}
    return Example(
        image_of(files, name),
        caption_of(texts, name),
        references_of(files),
        files.get(FACE_KEY),
    )
