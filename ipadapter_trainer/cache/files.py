"""The files of a feature cache.

    cache/manifest.json                          settings, hashes of the shards, what could not be read
          captions/shard-00000.safetensors       text_states [n, L, D], text_embeds [n, P] (SDXL)
          references/shard-00000.safetensors     image_features [n, V, ...] of images that are others' references
          images/shard-00000.safetensors         latents_mean and latents_std [n, V, C, h, w], sizes [n, V, 2], and
                                                 image_features of images that are their own reference

`row` [n] of every shard numbers its rows in the table. V are variants: random crops (`cache_variants`), each followed
by its mirror image with `flip`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipadapter_core.file_types import JSON, file_type

from ..data.images import Size
from ..errors import CacheError
from ..runtime.disk import whole_file
from .plan import CacheSettings

FORMAT = 2
MANIFEST = "manifest.json"
_METADATA = "ipadapter.cache"  # a single entry, because safetensors writes several in a random order
_TAIL = 64  # bytes
_NAMED = 5  # shards in a message


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was written."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> ShardFile:
        """Of the content of a file."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of. Only `complete` and `settings` decide whether a training may read it."""

    complete: bool
    settings: CacheSettings
    library: str
    base_model: str
    encoded_in: dict[str, str]  # model -> dtype
    buckets: list[Size]
    counts: dict[str, int]  # table -> rows
    shards: dict[str, ShardFile]  # by file
    broken: dict[str, dict[int, str]]  # table -> row -> why it could not be read
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write the manifest of a cache, whole or not at all."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards.values())


def read_manifest(folder: Path) -> Manifest:
    """Raises CacheError for a file that is no manifest, or that of another format."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        version = content["format"]
        if version == FORMAT:
            return TypeAdapter(Manifest).validate_python(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = file_type(file).name if file.is_file() else "no such file"
        found = "it is damaged" if found == JSON.name else found
        raise CacheError(f"{file}: not a cache's manifest ({found}). Make the cache again.") from error
    raise CacheError(
        f"{file}: a cache of format {version}, this version reads {FORMAT}. Make the cache again with "
        "`ipadapter cache`, in another folder."
    )


def check_shards(folder: Path, manifest: Manifest, *, hashes: bool = False) -> None:
    """Check the size, header and last bytes of every shard, and with `hashes` all bytes.

    Raises CacheError for a cache that is not complete, and for shards that are missing, cut off or changed.
    """
    if not manifest.complete:
        raise CacheError(f"{folder} was not finished. Run `ipadapter cache` with these settings.")
    key = manifest.settings.digest
    found = {name: _problem(folder / name, shard, key, hashes) for name, shard in manifest.shards.items()}
    problems = [f"{name} {problem}" for name, problem in found.items() if problem is not None]
    if problems:
        named = "; ".join(problems[:_NAMED]) + (f" and {len(problems) - _NAMED} more" if problems[_NAMED:] else "")
        raise CacheError(
            f"{folder}: {named}. Delete these files and run `ipadapter cache` with the same settings again: it makes "
            "these again."
        )


def check_hashes(folder: Path) -> Manifest:
    """The manifest of a cache whose shards have their hashes. Raises CacheError as `check_shards`."""
    manifest = read_manifest(folder)
    check_shards(folder, manifest, hashes=True)
    return manifest


def _problem(file: Path, written: ShardFile, key: str, hashes: bool) -> str | None:
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != written.bytes:
        return f"has {found:,} bytes instead of {written.bytes:,}"
    if _ends_in_zeros(file):
        return "ends in zeros"
    header = read_header(file)
    if header is None:
        return "is damaged"
    if header.key != key:
        return "belongs to another cache"
    changed = hashes and ShardFile.of(file.read_bytes()) != written
    return "has other content than when it was written" if changed else None


class ShardHeader(NamedTuple):
    """What identifies a shard, and the rows that could not be read with the reasons."""

    key: str  # CacheSettings.digest
    rows: np.ndarray
    broken: dict[int, str]


def read_header(file: Path) -> ShardHeader | None:
    """The header of a shard; None when the file is missing, cut off or something else."""
    try:
        if _ends_in_zeros(file):
            return None
        with safe_open(file, "pt") as opened:
            metadata = json.loads(opened.metadata()[_METADATA])
            broken = {int(row): reason for row, reason in metadata["broken"].items()}
            return ShardHeader(metadata["key"], opened.get_tensor("row").numpy(), broken)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def write_shard(file: Path, tensors: Mapping[str, Tensor], key: str, broken: Mapping[int, str]) -> ShardFile:
    """Write a shard, whole or not at all. Raises DiskError."""
    metadata = {_METADATA: json.dumps({"key": key, "broken": broken})}
    content = safetensors.torch.save(dict(tensors), metadata)
    write_whole(file, content)
    return ShardFile.of(content)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears under its name when all of it is on the disk. Raises DiskError."""
    with whole_file(file, need=len(content), kept="the shards that are written stay") as temporary:
        temporary.write_bytes(content)


def _ends_in_zeros(file: Path) -> bool:
    """Whether the end of a file was never written: a shard never ends in so many zeros."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _TAIL))  # 2: from the end
        return not stream.read().strip(b"\0")
