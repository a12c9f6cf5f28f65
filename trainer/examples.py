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

from .errors import DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_SUFFIXES = (".txt", ".caption")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Example:
    """A picture to learn, its caption, and the picture that is the prompt (None: the same one)."""

    image: Image.Image | Path
    text: str
    reference: Image.Image | Path | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.image) if isinstance(self.image, Path) else f"a picture in memory ({self.text!r})"


def find_examples(path: Path, root: Path | None = None) -> list[Example]:
    """List the examples of a data set, in a fixed order, without opening a picture.

    `path` is one of: a folder of pictures, each with its caption beside it (`cat.png`, `cat.txt` or
    `cat.caption`), sub folders included; a folder with a `metadata.jsonl`, or such a file: one `{"file_name":
    ..., "text": ...}` a line; the original trainer's JSON list `[{"image_file": ..., "text": ...}]`. The last
    two may name another prompt picture under "reference". File names are relative to `root`, by default the
    list's folder.

    Pictures without a caption, and rows whose picture does not exist, are left out with a warning. Raises
    DataError when nothing is left, naming what was found, and for a list that cannot be read, naming the
    line.
    """
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
    raise DataError(f"{path}: expected a folder, a .json list or a .jsonl file, not a {path.suffix or 'plain'} file.")


def fingerprint(examples: Iterable[Example], root: Path | None = None) -> str:
    """16 hex digits of all names (relative to `root`) and captions: it tells data sets apart, not edited
    pixels.
    """
    digest = hashlib.sha256()
    for example in examples:
        for part in (_relative(example.image, root), example.text, _relative(example.reference, root)):
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _relative(image: Image.Image | Path | None, root: Path | None) -> str:
    if not isinstance(image, Path):
        return ""
    return image.relative_to(root).as_posix() if root is not None and image.is_relative_to(root) else image.name


def _from_folder(folder: Path) -> list[Example]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in PICTURE_SUFFIXES]
    captions = {p for p in files if p.suffix.lower() in CAPTION_SUFFIXES}
    pairs = [(p, c) for p in pictures if (c := _caption_file(p, captions)) is not None]
    if not pairs:
        raise DataError(
            f"{folder}: found {len(pictures)} pictures and {len(captions)} captions, but no picture with a caption. "
            "Put cat.txt beside cat.png, or a metadata.jsonl into the folder."
        )
    if len(pairs) < len(pictures):
        without = next(p for p in pictures if _caption_file(p, captions) is None)
        log.warning(
            "%d of %d pictures have no caption and are left out, such as %s",
            len(pictures) - len(pairs),
            len(pictures),
            without,
        )
    return [Example(picture, _read(caption).strip()) for picture, caption in pairs]


def _caption_file(picture: Path, captions: set[Path]) -> Path | None:
    return next((c for s in CAPTION_SUFFIXES if (c := picture.with_suffix(s)) in captions), None)


def _from_jsonl(file: Path, root: Path | None) -> list[Example]:
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        if line.strip():
            rows.append((f"{file} line {number}", _parse(line, f"{file} line {number}")))
    return _from_rows(rows, "file_name", file, root)


def _from_json(file: Path, root: Path | None) -> list[Example]:
    content = _parse(_read(file), str(file))
    if not isinstance(content, list):
        raise DataError(
            f'{file}: expected a list [{{"image_file": ..., "text": ...}}], found a {type(content).__name__}.'
        )
    return _from_rows([(f"{file} entry {i}", row) for i, row in enumerate(content, 1)], "image_file", file, root)


def _from_rows(rows: Sequence[tuple[str, Any]], key: str, file: Path, root: Path | None) -> list[Example]:
    folder = root if root is not None else file.parent
    examples: list[Example] = []
    missing: list[str] = []
    for where, row in rows:
        name, text = _field(row, key, where), _field(row, "text", where)
        reference = _field(row, "reference", where) if row.get("reference") is not None else None
        absent = next((n for n in (name, reference) if n is not None and not (folder / n).is_file()), None)
        if absent is not None:
            missing.append(f"{folder / absent} ({where})")
            continue
        examples.append(Example(folder / name, text, None if reference is None else folder / reference))
    if not examples:
        found = f"none of its {len(rows)} pictures exists, such as {missing[0]}" if missing else "it is empty"
        raise DataError(f"{file}: {found}. File names are relative to {folder}; data_root changes that.")
    if missing:
        log.warning("%d of %d pictures do not exist and are left out, such as %s", len(missing), len(rows), missing[0])
    return examples


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
