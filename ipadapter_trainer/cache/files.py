"""The files of a feature cache, and the manifest that says what made them.

    cache/manifest.json                          settings; shards with their sizes and SHA-256; what could not be read
          texts/shard-00000.safetensors          text_states [n, L, D], text_embeds [n, P] (SDXL)
          references/shard-00000.safetensors     image_features [n, V, ...] of images that are others' references
          images/shard-00000.safetensors       latents_mean, latents_std [n, V, C, h, w], sizes, and image_features
                                                 of images that are their own reference

V counts variants: crops (`cache_variants`), and of each the image and its mirror image where `flip` is set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipadapter_core.file_types import JSON, file_type

from ..errors import CacheError
from ..runtime.disk import whole_file

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # the manifest of a cache that is being written
TABLES = ("texts", "references", "images")
_HEADER = "ipadapter.cache"  # one entry of metadata: safetensors writes several in an order that changes
SCALES = "image_features_scale"
_TAIL = 64  # bytes
_GROUP = 64  # channels that share a scale of the quantised features


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest: its rows of the table are `start` to `stop`, without the last."""

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str
    key: str = ""  # `Shard.key`; "" in a cache of an earlier version


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of. Only `settings` decide whether a training may read it."""

    settings: dict[str, Any]
    library: str
    base_model: str
    encoded_in: dict[str, str]  # part -> the dtype that it computed in
    stored_in: str
    buckets: list[list[int]]  # width, height
    counts: dict[str, int]  # table -> rows
    shards: dict[str, list[ShardEntry]] = field(default_factory=dict[str, list[ShardEntry]])
    broken: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])  # table -> row -> reason
    format: int = FORMAT

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(file, json.dumps(asdict(self), indent=1).encode())

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(entry.bytes for entries in self.shards.values() for entry in entries)


def read_manifest(file: Path) -> Manifest:
    """Raises CacheError for a file that is none, or of another version."""
    try:
        content = json.loads(file.read_bytes())
        version = content["format"]
        if version == FORMAT:
            manifest = TypeAdapter(Manifest).validate_python(content)
            if set(manifest.shards) == set(TABLES):
                return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        version = FORMAT
    if version == FORMAT:
        found = file_type(file).name if file.is_file() else "no such file"
        found = "it is damaged" if found == JSON.name else found
        raise CacheError(f"{file}: not a cache's manifest ({found}). Make the cache again.")
    raise CacheError(
        f"{file}: a cache of format {version}, this version reads {FORMAT}. Make the cache again with "
        "`ipadapter cache`, in another folder."
    )


def check_hashes(folder: Path) -> Manifest:
    """Compare every shard with the manifest, byte by byte.

    Raises CacheError that names every shard that is missing, cut off or changed.
    """
    manifest = read_manifest(folder / MANIFEST)
    problems: list[str] = []
    for entry in (entry for entries in manifest.shards.values() for entry in entries):
        problem = shard_problem(folder, entry)
        if problem is None and sha256_of(folder / entry.file) != entry.sha256:
            problem = f"{entry.file} has other content than when it was written"
        if problem is not None:
            problems.append(problem)
    if problems:
        raise CacheError(
            f"{folder}: {'; '.join(problems)}. Delete the named files and run `ipadapter cache` again: it makes only "
            "these."
        )
    return manifest


def shard_problem(folder: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard at first sight: its size, its header and its last bytes."""
    file = folder / entry.file
    if not file.is_file():
        return f"{entry.file} is missing"
    found = file.stat().st_size
    if found != entry.bytes:
        return f"{entry.file} has {found:,} bytes instead of {entry.bytes:,}"
    if _ends_in_zeros(file):
        return f"{entry.file} ends in zeros"
    header = read_header(file)
    if header is None:
        return f"{entry.file} is damaged"
    return f"{entry.file} belongs to another cache" if entry.key and header.key != entry.key else None


class ShardHeader(NamedTuple):
    """What a shard says of itself: `Shard.key`, and the reasons by the numbers of its rows that could not be read."""

    key: str
    broken: dict[str, str]


def write_shard(file: Path, tensors: Mapping[str, Tensor], header: ShardHeader) -> None:
    """Write a shard, whole or not at all. Raises DiskError."""
    write_whole(file, safetensors.torch.save(dict(tensors), {_HEADER: json.dumps(header._asdict())}))


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears under its name when all of it is on the disk. Raises DiskError."""
    with whole_file(file, need=len(content), kept="the shards that are written stay") as temporary:
        temporary.write_bytes(content)


def read_header(file: Path) -> ShardHeader | None:
    """Of a shard that is all there; None when it is missing, cut off or another file. Tensors are not read."""
    try:
        if _ends_in_zeros(file):
            return None
        with safe_open(file, "pt") as opened:
            return ShardHeader(**json.loads(opened.metadata()[_HEADER]))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def _ends_in_zeros(file: Path) -> bool:
    """Whether the end of a file was never written; what encoders give is never zero for so long."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _TAIL))  # 2: from the end
        return not stream.read().strip(b"\0")


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [..., E] -> int8 [..., E] and float16 scales [..., E / 64], one for 64 channels of a token, since the
    hidden states of vision transformers have a few channels that dwarf the others. (One for all channels where 64
    does not divide E.)
    """
    groups = features.float().unflatten(-1, (-1, channels_per_scale(features.shape[-1])))
    scales = (groups.abs().amax(-1) / 127).clamp(min=2**-24).half()  # the smallest float16
    values = (groups / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return values.flatten(-2), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """float16 [..., E] of what `quantise` made."""
    groups = values.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float()[..., None]).flatten(-2).half()


def channels_per_scale(channels: int) -> int:
    """How many channels of the quantised features share a scale."""
    return _GROUP if channels % _GROUP == 0 else channels
