"""Find pictures and captions on disk, in the layouts that people have."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .packed import PackedFile
from .pixels import Stored

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableEntry:
    """A face embedding in a table of many."""

    table: Path
    key: str


@dataclass(frozen=True, eq=False)
class Example:
    """A picture to learn, its caption, and what its image prompt is made of.

    `references` are other pictures that show the same, of which each use draws one; none: the picture itself.
    `face_id_embed` is where a face embedding is. `size` is (width, height) where the data set says it.
    """

    image: Stored
    text: str
    references: tuple[Stored, ...] = ()
    face_id_embed: Path | PackedFile | TableEntry | None = None
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"a picture in memory ({self.text!r})" if isinstance(self.image, Image.Image) else str(self.image)


@dataclass(frozen=True, eq=False)
class Found:
    """A data set: its examples, and what keeps other pictures out of it. Sentences that say what was looked at."""

    examples: list[Example]
    without_caption: list[Example]
    missing: list[str]  # files that a list names, with the place in the list
    nothing: str  # what to say when there is no example


def find_examples(path: Path, root: Path | None = None, require_caption: bool = True) -> list[Example]:
    """List the examples of a data set, in a fixed order, without opening a picture.

    `path` is one of: a folder of pictures, each with its caption beside it (`cat.png`, `cat.txt` or
    `cat.caption`), sub folders included; a folder with a `metadata.jsonl`, or such a file: one `{"file_name":
    ..., "text": ...}` a line; the original trainer's JSON list `[{"image_file": ..., "text": ...}]`. Rows of the
    last two may name another prompt picture, or a list of them, under "reference", the file of a face embedding
    under "id_embed_file", and the picture's "width" and "height". File names are relative to `root`, by default the
    list's folder.

    Pictures without a caption, unless `require_caption` is off, and rows of which a file does not exist are left out
    with a warning. Raises DataError when nothing is left, naming what was found, and for a list that cannot be read,
    naming the line.
    """
    found = scan(path, root)
    examples = found.examples
    if not require_caption and found.without_caption:
        examples = sorted(examples + found.without_caption, key=lambda example: example.name)
    if not examples:
        raise DataError(found.nothing)
    if require_caption and found.without_caption:
        count, without = len(found.without_caption), found.without_caption[0].name
        log.warning(
            "%d of %d pictures have no caption and are left out, such as %s", count, len(examples) + count, without
        )
    if found.missing:
        count = len(found.missing)
        log.warning(
            "%d of %d rows name a file that does not exist and are left out, such as %s",
            count,
            len(examples) + count,
            found.missing[0],
        )
    return examples


def scan(path: Path, root: Path | None = None) -> Found:
    """What `find_examples` chooses from. Raises DataError for a path or a list that cannot be read."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Set data to your pictures.")
    if path.is_dir():
        metadata = path / "metadata.jsonl"
        return _from_jsonl(metadata, root) if metadata.is_file() else _from_folder(path)
    if path.suffix == ".jsonl":
        return _from_jsonl(path, root)
    if path.suffix == ".json":
        return _from_json(path, root)
    raise DataError(
        f"{path}: expected a folder, a .json list, a .jsonl file or .tar shards, not a {path.suffix or 'plain'} file."
    )


def fingerprint(examples: Iterable[Example], root: Path | None = None) -> str:
    """16 hex digits of all names (relative to `root`) and captions: it tells data sets apart, not edited
    pixels.
    """
    digest = hashlib.sha256()
    for example in examples:
        files = (example.image, *example.references, example.face_id_embed)
        for part in (example.text, *(relative_name(file, root) for file in files)):
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def relative_name(image: Stored | TableEntry | None, root: Path | None) -> str:
    """A file's name relative to `root`, so that the data set may move; "" for a picture in memory."""
    if isinstance(image, TableEntry):
        return f"{relative_name(image.table, root)}:{image.key}"
    if isinstance(image, PackedFile):
        return f"{image.archive.name}/{image.member}"
    if not isinstance(image, Path):
        return ""
    return image.relative_to(root).as_posix() if root is not None and image.is_relative_to(root) else image.name


def _from_folder(folder: Path) -> Found:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in PICTURE_SUFFIXES]
    captions = {p for p in files if p.suffix.lower() in CAPTION_SUFFIXES}
    pairs = [(picture, _caption_file(picture, captions)) for picture in pictures]
    return Found(
        [Example(picture, _read(caption).strip()) for picture, caption in pairs if caption is not None],
        [Example(picture, "") for picture, caption in pairs if caption is None],
        [],
        f"{folder}: found {len(pictures)} pictures and {len(captions)} captions, but no picture with a caption. "
        "Put cat.txt beside cat.png, or a metadata.jsonl into the folder.",
    )


def _caption_file(picture: Path, captions: set[Path]) -> Path | None:
    return next((c for s in CAPTION_SUFFIXES if (c := picture.with_suffix(s)) in captions), None)


def _from_jsonl(file: Path, root: Path | None) -> Found:
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            rows.append((f"{file} line {number}", _parse(line, f"{file} line {number}")))
    return _from_rows(rows, "file_name", file, root)


def _from_json(file: Path, root: Path | None) -> Found:
    content = _parse(_read(file), str(file))
    if not isinstance(content, list):
        raise DataError(
            f'{file}: expected a list [{{"image_file": ..., "text": ...}}], found a {type(content).__name__}.'
        )
    return _from_rows([(f"{file} entry {i}", row) for i, row in enumerate(content, 1)], "image_file", file, root)


def _from_rows(rows: Sequence[tuple[str, Any]], key: str, file: Path, root: Path | None) -> Found:
    folder = root if root is not None else file.parent
    examples: list[Example] = []
    missing: list[str] = []
    for where, row in rows:
        example = _from_row(row, key, folder, where)
        files = (example.image, *example.references, example.face_id_embed)
        absent = next((f for f in files if isinstance(f, Path) and not f.is_file()), None)
        if absent is None:
            examples.append(example)
        else:
            missing.append(f"{absent} ({where})")
    found = f"none of its {len(rows)} pictures exists, such as {missing[0]}" if missing else "it is empty"
    nothing = f"{file}: {found}. File names are relative to {folder}; data_root changes that."
    return Found(examples, [], missing, nothing)


def _from_row(row: Any, key: str, folder: Path, where: str) -> Example:
    name, text = _field(row, key, where), _field(row, "text", where)
    references = row.get("reference") or ()
    if isinstance(references, str):
        references = (references,)
    if not isinstance(references, list | tuple) or not all(isinstance(reference, str) for reference in references):
        raise DataError(f"{where}: 'reference' must be a file name or a list of them, found {references!r:.60}.")
    face = _field(row, "id_embed_file", where) if row.get("id_embed_file") is not None else None
    width, height = row.get("width"), row.get("height")
    return Example(
        folder / name,
        text,
        tuple(folder / reference for reference in references),
        None if face is None else _face_file(folder, face),
        (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None,
    )


def _face_file(folder: Path, name: str) -> Path:
    """Relative to the pictures' folder; or as it stands, as tutorial_train_faceid.py opens it."""
    return folder / name if (folder / name).is_file() or not Path(name).is_file() else Path(name)


def _field(row: Any, key: str, where: str) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with {key!r} and 'text', found {row!r:.60}.")
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, found {value!r:.60} (keys: {', '.join(map(str, row))}).")
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
