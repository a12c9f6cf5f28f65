"""Face embeddings (ArcFace's, computed once with insightface) from files, for the faceid kinds."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import DataError
from .examples import Example, TableEntry, relative_name
from .files import ARRAYS, TarMember, first_bytes, wrong_file

EMBED_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth", ".bin")
TABLE_SUFFIXES = (".safetensors", ".npz")
_CHECKED = 32  # embeddings that are read before the start of a training

log = logging.getLogger(__name__)


def with_faces(
    examples: Sequence[Example], table: Path | None = None, root: Path | None = None, dim: int = 512
) -> list[Example]:
    """The examples that have a face embedding, each with its file or table entry.

    `table` is a .safetensors or .npz file with one tensor [F] or [1, F] per image, by the image's file name: bare, or
    relative to `root`, the data set's folder. A file that an example names itself has priority.

    Examples without one are left out with a warning. Raises DataError when none has one, for a table that cannot be
    read, a key that fits several images, and when none of the first embeddings can be read or has `dim` values.
    """
    found = list(examples if table is None else _from_table(examples, table, root))
    with_embed = [example for example in found if example.face_id_embed is not None]
    if not with_embed:
        reason = "no row names one (id_embed_file) and face_embeds is not set"
        if table is not None:
            keys = list(_open_table(table, os.getpid()).keys())
            reason = f"{table} has none of their names but {len(keys):,} others, such as {', '.join(keys[:3])}"
        raise DataError(
            f"None of the {len(examples)} images has a face embedding: {reason}. The first image is {examples[0].name}."
        )
    if len(with_embed) < len(found):
        first = next(example.name for example in found if example.face_id_embed is None)
        count = f"{len(found) - len(with_embed):,} of {len(found):,} images"
        log.warning("%s have no face embedding and are left out, such as %s", count, first)
    _check_first(with_embed[:_CHECKED], dim)
    return with_embed


def face_id_embed(example: Example, dim: int = 512) -> Tensor:
    """An example's face embedding, float32 [F].

    Raises DataError when it has none, for a file that cannot be read, another size and values that are not finite.
    """
    source = example.face_id_embed
    if source is None:
        raise DataError(f"{example.name}: no face embedding (id_embed_file, face_embeds, or .face.npy in a shard).")
    if not isinstance(source, TableEntry):
        return check_face_embed(read_face_embed(source), dim, str(source))
    # A forked worker must not share the position in a file with its parent, so it opens its own.
    table, name = _open_table(source.table, os.getpid()), f"{source.table}: {source.key}"
    try:
        is_numpy = source.table.suffix == ".npz"
        embed = torch.from_numpy(table[source.key]) if is_numpy else table.get_tensor(source.key)
    except Exception as error:
        raise DataError(f"{name} cannot be read ({error}).") from error
    return check_face_embed(embed, dim, name)


def read_face_embed(file: Path | TarMember) -> Tensor:
    """One embedding from a .npy file, a .safetensors file with one tensor, or a torch file (.pt, .pth, .bin) that holds
    a tensor or, as the original trainer's do, a numpy array. No code in a file is executed.

    Raises DataError for another suffix and for a file that cannot be read.
    """
    if file.suffix not in EMBED_SUFFIXES:
        raise DataError(f"{file}: expected a face embedding ({', '.join(EMBED_SUFFIXES)}).")
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load(file.read_bytes())
            if len(tensors) != 1:
                raise DataError(f"{file}: holds {len(tensors):,} tensors; expected one, a face embedding.")
            return next(iter(tensors.values()))
        with file.open("rb") as stream:
            if file.suffix == ".npy":
                return torch.from_numpy(np.load(stream, allow_pickle=False))
            with torch.serialization.safe_globals(_numpy_globals()):
                value = torch.load(stream, map_location="cpu", weights_only=True)
            return value if isinstance(value, Tensor) else torch.from_numpy(value)
    except DataError:
        raise
    except Exception as error:  # of many types, from three libraries
        if isinstance(error, OSError) and error.strerror is not None:
            raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
        if isinstance(error, pickle.UnpicklingError) and first_bytes(file).startswith((b"PK", b"\x80")):
            raise DataError(f"{file}: holds more than an array. Save the array alone, with numpy.save.") from error
        raise wrong_file(file, "a face embedding", ARRAYS) from error


def check_face_embed(embed: Tensor, dim: int, name: str) -> Tensor:
    """[F] or [1, F] of any float type -> float32 [F]. Raises DataError for another shape, and for values that
    are not finite or all zero."""
    if embed.shape not in ((dim,), (1, dim)):
        raise DataError(f"{name}: expected a face embedding of {dim} values, found the shape {tuple(embed.shape)}.")
    embed = embed.reshape(dim).float()
    if not embed.isfinite().all():
        raise DataError(f"{name}: the face embedding has values that are not finite.")
    if not embed.any():
        raise DataError(f"{name}: the face embedding is all zeros: no face was found, or the file is damaged.")
    return embed


def _numpy_globals() -> list[Any]:
    """The functions that a pickled array of floats calls, with the names of numpy 1 and of numpy 2."""
    rebuild = np.array(0).__reduce__()[0]
    types = {type(np.dtype(name)) for name in ("float16", "float32", "float64")}
    names = [(rebuild, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")]
    return [np.ndarray, np.dtype, *types, *names]


@lru_cache(maxsize=4)
def _open_table(table: Path, process: int) -> Any:
    if table.suffix not in TABLE_SUFFIXES:
        raise DataError(f"{table}: face_embeds must be a {' or '.join(TABLE_SUFFIXES)} file.")
    try:
        return np.load(table, allow_pickle=False) if table.suffix == ".npz" else safetensors.safe_open(table, "pt")
    except Exception as error:
        if not table.is_file():
            raise DataError(f"{table}: no such file. Set face_embeds to your table of face embeddings.") from error
        raise wrong_file(table, "a table of face embeddings", ARRAYS) from error


def _from_table(examples: Iterable[Example], table: Path, root: Path | None) -> Iterable[Example]:
    """The examples, with an entry of the table if there is one and the example names no file."""
    keys = set(_open_table(table, os.getpid()).keys())
    users: dict[str, Path] = {}  # a bare name -> the image that uses it
    for example in examples:
        image = example.image
        if example.face_id_embed is not None or not isinstance(image, Path):
            yield example
            continue
        key = relative_name(image, root)
        if key not in keys:
            key = image.name
            if key in keys and users.setdefault(key, image) != image:
                raise DataError(
                    f"{table}: the key {key!r} fits both {users[key]} and {image}. Use file names relative to the data "
                    "set's folder as keys."
                )
        yield replace(example, face_id_embed=TableEntry(table, key)) if key in keys else example


def _check_first(examples: Sequence[Example], dim: int) -> None:
    """Raises the first error if no embedding can be read. Single errors are reported when a batch needs the example."""
    norms: list[float] = []
    errors: list[DataError] = []
    for example in examples:
        try:
            norms.append(float(face_id_embed(example, dim).norm()))
        except DataError as error:
            errors.append(error)
    if not norms:
        raise errors[0]
    if any(abs(norm - 1) > 0.05 for norm in norms):
        log.warning(
            f"The face embeddings have norms from {min(norms):.3g} to {max(norms):.3g}. The published faceid adapters, "
            "and the nodes and pipelines that use them, take embeddings of norm 1 (insightface's normed_embedding)."
        )
