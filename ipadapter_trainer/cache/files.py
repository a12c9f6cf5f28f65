"""The files of a feature cache.

    cache/manifest.json                          settings, and the names of the shards; written before them
          captions/shard-00000.safetensors       text_states [n, 1, L, D], text_embeds [n, 1, P] (SDXL)
          references/shard-00000.safetensors     image_features [n, V, ...] of images that are others' references
          images/shard-00000.safetensors         latents_mean and latents_std [n, V, C, h, w], sizes [n, V, 2], and
                                                 image_features of images that are their own reference

`row` [n] of every shard numbers its rows. `file_size` [n] are the bytes of the files of images and references, which
tell when one was replaced. V are variants: random crops (`cache_variants`), each followed by its mirror
image with `flip`. The metadata of a shard are its settings, and the rows that could not be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter
from torch import Tensor

from ipadapter_core import AdapterError
from ipadapter_core.file_types import JSON, file_type
from ipadapter_core.tensors import open_tensors

from ..data.images import Size, file_size
from ..errors import CacheError
from ..runtime.disk import whole_file

FORMAT = 5
SIZES = ("original_size", "crop_coords_top_left", "target_size")
MANIFEST = "manifest.json"
_METADATA = "ipadapter.cache"  # a single entry, because safetensors writes several in a random order
_TAIL = 64  # bytes
_NEEDED = {
    "captions": {"row", "text_states"},
    "references": {"row", "file_size", "image_features"},
    "images": {"row", "file_size", "latents_mean", "latents_std", *SIZES},
}
# What decides a setting of the cache, where that is none of the config.
_CONFIG_KEYS = {"image_feature": "image_feature (kind)", "own_references": "own_references (self_reference > 0)"}


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of. Only `settings` decide whether a training may read it."""

    settings: dict[str, Any]  # `cache_settings`
    shards: list[str]  # files; the cache is complete when all are there
    buckets: list[Size]
    library: str
    base_model: str
    mixed_precision: str
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write the manifest of a cache, whole or not at all. Raises DiskError."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())


def read_manifest(folder: Path, settings: Mapping[str, Any]) -> Manifest:
    """The manifest of the cache that has these settings.

    Raises CacheError for a file that is no manifest, for another format, and for other settings, with every difference.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        version = content["format"]
        manifest = TypeAdapter(Manifest).validate_python(content) if version == FORMAT else None
        if manifest and (len({*manifest.shards}) < len(manifest.shards) or any(min(b) < 1 for b in manifest.buckets)):
            raise ValueError("names a shard twice, or an impossible bucket")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = "it is damaged" if file_type(file) == JSON else file_type(file).name
        raise CacheError(f"{file}: not a cache's manifest ({found}). Make the cache again.") from error
    if manifest is None:
        raise CacheError(
            f"{file}: a cache of format {version!r}, this version reads {FORMAT}. Make the cache again with "
            "`ipadapter cache`, in another folder."
        )
    before = dict.fromkeys(settings) | manifest.settings
    if before["own_references"]:  # more features than are needed do no harm
        settings = {**settings, "own_references": True}
    differences = [
        f"{_CONFIG_KEYS.get(k, k)} was {before[k]!r} and is now {now!r}"
        for k, now in settings.items()
        if before[k] != now and k != "data"
    ]
    if before["data"] != settings["data"] and before["images"] == settings["images"]:
        differences.append(f"its {settings['images']:,} images had other file names or captions")
    if differences:
        raise CacheError(
            f"{folder} is the cache of other settings: {'; '.join(differences)}. Set them back, or make another with "
            "`ipadapter cache`: choose another folder with cache=..., or delete this one."
        )
    return manifest


def open_shard(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The memory-mapped tensors of a shard, and the rows that could not be read with the reasons.

    Raises CacheError for a shard that is missing, damaged or of another cache.
    """
    try:
        opened = open_tensors(file, "a shard of a cache")
        metadata = json.loads(opened.metadata[_METADATA])
        with file.open("rb") as stream:
            stream.seek(-_TAIL, os.SEEK_END)
            if not stream.read().strip(b"\0"):
                raise ValueError("ends in zeros")
        if metadata["settings"] == settings:
            tensors = {name: opened.read(name) for name in opened.infos}
            if not _NEEDED[file.parent.name] <= tensors.keys():
                raise ValueError("lacks a tensor")
            return tensors, {int(row): reason for row, reason in metadata["broken"].items()}
        problem = "belongs to another cache"
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, AdapterError, ValueError, KeyError, TypeError, AttributeError):
        problem = "is damaged"
    raise CacheError(
        f"{file} {problem}. Run `ipadapter cache` with the same settings again: it makes all shards again that are "
        "missing or damaged."
    )


def replaced_image(tensors: Mapping[str, Tensor], broken: Mapping[int, str], sources: Sequence[Any]) -> str:
    """A sentence about an image of a shard whose file had another size when it was encoded; "" if there is none."""
    if "file_size" not in tensors:  # captions
        return ""
    for row, before in zip(tensors["row"].tolist(), tensors["file_size"].tolist(), strict=True):
        if row not in broken and (now := file_size(sources[row])) != before:
            return f"{sources[row]} had {before:,} bytes when it was cached and now has {now:,}."
    return ""


def write_shard(
    file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], broken: Mapping[int, str]
) -> None:
    """Write a shard, whole or not at all. Raises DiskError."""
    metadata = {_METADATA: json.dumps({"settings": settings, "broken": broken})}
    write_whole(file, safetensors.torch.save(dict(tensors), metadata))


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears under its name when all of it is on the disk. Raises DiskError."""
    with whole_file(file, need=len(content), kept="the shards that are written stay") as temporary:
        temporary.write_bytes(content)
