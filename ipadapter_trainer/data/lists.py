"""Lists of examples: .jsonl and .csv in the format of Hugging Face's ImageFolder, and the original trainer's .json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .files import read_text

LIST_SUFFIXES = (".json", ".jsonl", ".csv")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # the list of a folder
_REQUIRED_COLUMNS = ("file_name", "text")
_INTEGER_COLUMNS = ("width", "height")


class Row(NamedTuple):
    """A row of a list. The other values have not been checked."""

    location: str  # file and line, for messages
    image: str
    text: str
    values: Mapping[str, Any]


def read_list(file: Path) -> tuple[list[Row], list[str]]:
    """The rows of a list, and an error for each row that cannot be read.

    Raises DataError for a file of which nothing can be read.
    """
    text = read_text(file, "a list of images and captions")
    read, image_key = {".json": (_json, "image_file"), ".jsonl": (_jsonl, "file_name"), ".csv": (_csv, "file_name")}[
        file.suffix.lower()
    ]
    problems: list[str] = []
    rows: list[Row] = []
    for location, values in read(text, file) if text.strip() else ():
        try:
            if isinstance(values, DataError):
                raise values
            rows.append(
                Row(location, text_value(values, image_key, location), text_value(values, "text", location), values)
            )
        except DataError as error:
            problems.append(str(error))
    return rows, problems


def text_value(values: Any, key: str, location: str) -> str:
    """A row's text for a key. Raises DataError when there is none."""
    if not isinstance(values, Mapping):
        raise DataError(f"{location}: expected an object with {key!r} and 'text', found {values!r:.60}.")
    value = values.get(key)
    if not isinstance(value, str):
        keys = ", ".join(map(str, values))
        raise DataError(f"{location}: {key!r} must be text, found {value!r:.60} (keys: {keys:.100}).")
    return value


def _json(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """The location and the values, or the error, of every row; so do the two below."""
    content = _parse(text, str(file))
    if not isinstance(content, list):
        raise DataError(
            f'{file}: expected a list [{{"image_file": ..., "text": ...}}], found a {type(content).__name__}.'
        )
    for number, values in enumerate(content, 1):
        yield f"{file} entry {number}", values


def _jsonl(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON does not escape
        if line.strip():
            location = f"{file} line {number}"
            try:
                yield location, _parse(line, location)
            except DataError as error:
                yield location, error


def _csv(text: str, file: Path) -> Iterator[tuple[str, Any]]:
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
                yield location, DataError(f'{location}: {found}. Put "a caption, with commas" in quotes.')
    except csv.Error as error:
        location = f"{file} line {reader.line_num}"
        yield location, DataError(f"{location}: not valid CSV ({error}); the lines after it are not read.")


def _csv_value(column: str, cell: str) -> Any:
    """As in JSON: integers, and None for an empty optional cell."""
    if column in _INTEGER_COLUMNS and cell.isdecimal():
        return int(cell)
    return cell if cell or column in _REQUIRED_COLUMNS else None


def _parse(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not valid JSON ({error}).") from error
