"""Lists of examples: .jsonl and .csv in the format of Hugging Face's ImageFolder, and the original trainer's .json."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import read_text

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # the list of a folder
_REQUIRED_COLUMNS = ("file_name", "text")
_INTEGER_COLUMNS = ("width", "height")
_KEYS = ("text", "reference", "id_embed_file", *_INTEGER_COLUMNS)  # besides that of the image


def read_list(file: Path) -> Iterator[tuple[str, Any]]:
    """The file and line, for messages, and the values of every row; or a DataError if the row cannot be parsed.

    Raises DataError for a file of which nothing can be read.
    """
    text = read_text(file, "a list of images and captions")
    if text.strip():
        read = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}[file.suffix.lower()]
        yield from read(text, file)


def misspelt_keys(keys: Mapping[str, int]) -> list[str]:
    """A sentence for each key that is not read but nearly one that is. `keys` are those of all rows, with their number
    of rows.
    """
    sentences: list[str] = []
    for key in keys.keys() - set(_KEYS):
        if near := difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.85):  # "weight" is no "height"
            sentences.append(f"The key {key!r} is ignored (rows: {keys[key]:,}). Did you mean {near[0]!r}?")
    return sorted(sentences)


def _read_json(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    content = _parse(text)
    if isinstance(content, DataError):
        raise DataError(f"{file}: {content}")
    if not isinstance(content, list):
        found = type(content).__name__
        raise DataError(f'{file}: expected a list [{{"image_file": ..., "text": ...}}], found a {found}.')
    yield from ((f"{file} entry {number}", values) for number, values in enumerate(content, 1))


def _read_jsonl(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON does not escape
        if line.strip():
            yield f"{file} line {number}", _parse(line)


def _read_csv(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader)]
        if not set(_REQUIRED_COLUMNS) <= set(columns):
            found = ", ".join(columns)[:100]
            raise DataError(f"{file}: its columns are {found}; expected file_name and text, separated by commas.")
        for cells in reader:
            location = f"{file} line {reader.line_num}"
            if len(cells) == len(columns):
                yield location, {column: _csv_value(column, cell) for column, cell in zip(columns, cells, strict=True)}
            elif cells:
                found = f"{len(cells)} values for {len(columns)} columns"
                yield location, DataError(f'{found}. Put "a caption, with commas" in quotes.')
    except csv.Error as error:
        message = f"not valid CSV ({error}); the lines after it are not read."
        yield f"{file} line {reader.line_num}", DataError(message)


def _csv_value(column: str, cell: str) -> Any:
    """As in JSON: integers, and None for an empty optional cell."""
    if column in _INTEGER_COLUMNS and cell.isdecimal():
        return int(cell)
    return cell if cell or column in _REQUIRED_COLUMNS else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON ({error}).")
