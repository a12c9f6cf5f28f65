"""Lists of examples: .jsonl and .csv as Hugging Face's ImageFolder has them, and the original trainer's .json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .file_kinds import read_text

LIST_SUFFIXES = (".json", ".jsonl", ".csv")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # a folder's list
_TEXT_COLUMNS = ("file_name", "text")  # the others may be empty
_COUNT_COLUMNS = ("width", "height")


class Row(NamedTuple):
    """A row of a list. `image` and `text` are there; the other values are as the list has them."""

    where: str  # for messages
    image: str
    text: str
    values: Mapping[str, Any]


def read_list(file: Path) -> tuple[list[Row], list[str]]:
    """The rows of a list, and a sentence for each row that cannot be read.

    Raises DataError for a file of which nothing can be read.
    """
    text = read_text(file, "a list of images and captions")
    read, key = {".json": (_json, "image_file"), ".jsonl": (_jsonl, "file_name"), ".csv": (_csv, "file_name")}[
        file.suffix.lower()
    ]
    problems: list[str] = []
    rows: list[Row] = []
    for where, values in read(text, file, problems.append) if text.strip() else ():
        try:
            rows.append(Row(where, field(values, key, where), field(values, "text", where), values))
        except DataError as error:
            problems.append(str(error))
    return rows, problems


def field(values: Any, key: str, where: str) -> str:
    """A row's text under a key. Raises DataError when there is none."""
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: expected an object with {key!r} and 'text', found {values!r:.60}.")
    value = values.get(key)
    if not isinstance(value, str):
        keys = ", ".join(map(str, values))
        raise DataError(f"{where}: {key!r} must be text, found {value!r:.60} (keys: {keys:.100}).")
    return value


def _json(text: str, file: Path, report: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    content = _parse(text, str(file))
    if not isinstance(content, list):
        raise DataError(
            f'{file}: expected a list [{{"image_file": ..., "text": ...}}], found a {type(content).__name__}.'
        )
    for number, values in enumerate(content, 1):
        yield f"{file} entry {number}", values


def _jsonl(text: str, file: Path, report: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON leaves as it is
        if line.strip():
            try:
                yield f"{file} line {number}", _parse(line, f"{file} line {number}")
            except DataError as error:
                report(str(error))


def _csv(text: str, file: Path, report: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader)]
        if not set(_TEXT_COLUMNS) <= set(columns):
            found = ", ".join(columns)[:100]
            raise DataError(f"{file}: its columns are {found}; expected file_name and text, separated by commas.")
        for cells in reader:
            where = f"{file} line {reader.line_num}"
            if len(cells) == len(columns):
                yield where, dict(_cell(*pair) for pair in zip(columns, cells, strict=True))
            elif cells:
                report(
                    f'{where}: {len(cells)} values for {len(columns)} columns. Put "a caption, with commas" in quotes.'
                )
    except csv.Error as error:
        report(f"{file} line {reader.line_num}: not valid CSV ({error}); the lines after it are not read.")


def _cell(column: str, cell: str) -> tuple[str, Any]:
    """A value as JSON would have it."""
    if column in _COUNT_COLUMNS and cell.isdecimal():
        return column, int(cell)
    return column, cell if cell or column in _TEXT_COLUMNS else None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
