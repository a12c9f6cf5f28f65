"""Face embeddings (ArcFace's, made once with insightface) from files, for the faceid kinds."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ipadapter_core.file_types import START

from ..errors import DataError
from .examples import Example, TableEntry
from .file_kinds import ARRAYS, first_bytes, wrong_file
from .tar_member import PackedFile

EMBED_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth", ".bin")
TABLE_SUFFIXES = (".safetensors", ".npz")
_LOOKED_AT = 32  # how many are read before the start

log = logging.getLogger(__name__)


def with_faces(
    examples: Sequence[Example], table: Path | None = None, root: Path | None = None, width: int = 512
) -> list[Example]:
    """The examples that have a face embedding, each saying where it is.

    `table` is a .safetensors or .npz file with one tensor [F] or [1, F] an image, under its file name: relative to
    `root`, the data set's folder, or bare. A file that an example names itself goes first.

    Examples without one are left out with a warning. Raises DataError when none has one, for a table that cannot be
    read, a key that fits several images, and when none of the first embeddings can be read or has `width`
    values.
    """
    found = examples if table is None else _from_table(examples, table, root)
    having = [example for example in found if example.face_id_embed is not None]
    if not having:
        where = "no row names one (id_embed_file) and face_embeds is not set"
        if table is not None:
            keys = list(_open_table(table, os.getpid()).keys())
            where = f"{table} has none of their names but {len(keys):,} others, such as {', '.join(keys[:3])}"
        raise DataError(
            f"None of the {len(examples)} images has a face embedding: {where}. The first image is {examples[0].name}."
        )
    if len(having) < len(examples):
        without = next(example for example in found if example.face_id_embed is None)
        log.warning(
            "%d of %d images have no face embedding and are left out, such as %s",
            len(examples) - len(having),
            len(examples),
            without.name,
        )
    _look_at(having[:_LOOKED_AT], width)
    return having


def face_id_embed(example: Example, width: int = 512) -> Tensor:
    """An example's face embedding, float32 [F].

    Raises DataError when it has none, for a file that cannot be read, another width and values that are not finite.
    """
    place = example.face_id_embed
    if place is None:
        raise DataError(f"{example.name}: no face embedding.")
    if isinstance(place, Path | PackedFile):
        return check_face_embed(read_face_embed(place), width, str(place))
    # A forked worker must not share the position in a file with its parent, so it opens its own.
    table = _open_table(place.table, os.getpid())
    try:
        embed = (
            table.get_tensor(place.key) if place.table.suffix == ".safetensors" else torch.from_numpy(table[place.key])
        )
    except Exception as error:
        raise DataError(f"{place.table}: {place.key} cannot be read ({error}).") from error
    return check_face_embed(embed, width, f"{place.table}: {place.key}")


def read_face_embed(file: Path | PackedFile) -> Tensor:
    """One embedding from a .npy file, a .safetensors file with one tensor, or a torch file (.pt, .pth, .bin) that holds
    a tensor or, as the original trainer's do, a numpy array. Nothing in a file is executed.

    Raises DataError for another suffix and for a file that cannot be read.
    """
    if file.suffix not in EMBED_SUFFIXES:
        *others, last = EMBED_SUFFIXES
        raise DataError(f"{file}: expected a {', '.join(others)} or {last} file with a face embedding.")
    try:
        content = file.read() if isinstance(file, PackedFile) else file.read_bytes()
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load(content)
            if len(tensors) != 1:
                raise DataError(f"{file}: holds {len(tensors):,} tensors; expected one, a face embedding.")
            return next(iter(tensors.values()))
        with torch.serialization.safe_globals(_numpy_globals()):
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return value if isinstance(value, Tensor) else torch.from_numpy(value)
    except DataError:
        raise
    except Exception as error:  # of many kinds, from three libraries
        if isinstance(error, OSError) and error.strerror is not None:
            raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
        start = _start(file)
        if isinstance(error, pickle.UnpicklingError) and start.startswith((b"PK", b"\x80")):
            raise DataError(
                f"{file}: holds more than an array. Save the array alone, with numpy.save as .npy."
            ) from error
        raise wrong_file(file, start, "a face embedding", ARRAYS) from error


def _start(file: Path | PackedFile) -> bytes:
    return file.read()[:START] if isinstance(file, PackedFile) else first_bytes(file)


def check_face_embed(embed: Tensor, width: int, name: str) -> Tensor:
    """[F] or [1, F] of any float type -> float32 [F]. Raises DataError for another shape, and for values that
    are not finite or all zero."""
    if embed.shape not in ((width,), (1, width)):
        raise DataError(f"{name}: expected a face embedding of {width} values, found the shape {tuple(embed.shape)}.")
    embed = embed.reshape(width).float()
    if not embed.isfinite().all():
        raise DataError(f"{name}: the face embedding has values that are not finite.")
    if not embed.any():
        raise DataError(f"{name}: the face embedding is all zeros: no face was found, or the file is damaged.")
    return embed


def _numpy_globals() -> list[Any]:
    """The functions that a pickled array of floats calls, under the names of numpy 1 and of numpy 2."""
    rebuild = np.array(0).__reduce__()[0]
    types = {type(np.dtype(name)) for name in ("float16", "float32", "float64")}
    names = [(rebuild, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")]
    return [np.ndarray, np.dtype, *types, *names]


@lru_cache(maxsize=4)
def _open_table(table: Path, process: int) -> Any:
    if table.suffix not in TABLE_SUFFIXES:
        raise DataError(f"{table}: face_embeds must be a {' or '.join(TABLE_SUFFIXES)} file.")
    try:
        if table.suffix == ".npz":
            return np.load(table, allow_pickle=False)
        from safetensors import safe_open

        return safe_open(table, "pt")
    except Exception as error:
        if not table.is_file():
            raise DataError(f"{table}: no such file. Set face_embeds to your table of face embeddings.") from error
        raise wrong_file(table, first_bytes(table), "a table of face embeddings", ARRAYS) from error


def _from_table(examples: Iterable[Example], table: Path, root: Path | None) -> list[Example]:
    """The examples, with their entry of the table where there is one and they name no file."""
    known = set(_open_table(table, os.getpid()).keys())
    found: list[Example] = []
    users: dict[str, Path] = {}  # a bare name -> the image that took it
    for example in examples:
        image = example.image
        if example.face_id_embed is not None or not isinstance(image, Path):
            found.append(example)
            continue
        key = image.relative_to(root).as_posix() if root is not None and image.is_relative_to(root) else image.name
        if key not in known:
            key = image.name
            if key in known and users.setdefault(key, image) != image:
                raise DataError(
                    f"{table}: the key {key!r} fits both {users[key]} and {image}. Use file names relative to the data "
                    "set's folder as keys."
                )
        found.append(replace(example, face_id_embed=TableEntry(table, key)) if key in known else example)
    return found


def _look_at(examples: Sequence[Example], width: int) -> None:
    """Notice at the start what is wrong with all of them; a single one is named when it is its turn."""
    norms: list[float] = []
    errors: list[DataError] = []
    for example in examples:
        try:
            norms.append(float(face_id_embed(example, width).norm()))
        except DataError as error:
            errors.append(error)
    if not norms:
        raise errors[0]
    if any(abs(norm - 1) > 0.05 for norm in norms):
        log.warning(
            "The face embeddings have norms from %.3g to %.3g. The published faceid adapters take embeddings of norm 1 "
            "(insightface's normed_embedding), and so do the nodes and pipelines that use them.",
            min(norms),
            max(norms),
        )
