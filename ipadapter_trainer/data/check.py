"""`ipadapter data check`: what is in a data set, and what is wrong with it, before a training finds out."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm.auto import tqdm

from ..errors import DataError
from ..report.contact_sheet import Cell, contact_sheet
from .check_report import DataReport, ImageFacts, make_report
from .duplicates import can_hash_images, image_hash
from .examples import Example, ScanResult, scan
from .images import open_rgb, why_unreadable
from .shard_files import expand_shards, is_shards, parse_sample, raw_samples, shard_name

SAMPLES = 24  # on the contact sheet
_THUMBNAIL = 256
_WAITING = 64  # images that are read ahead

Thing = TypeVar("Thing")
Result = TypeVar("Result")
Read = Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class DataEntry:
    """An image of a data set, not yet read."""

    name: str
    read: Read
    text: str | None  # None: there is no caption
    references: tuple[Read, ...] = ()
    has_face: bool = False


def check_data(
    data: str | Path,
    root: Path | None = None,
    *,
    min_side: int = 512,
    sheet: Path | None = None,
    threads: int | None = None,
    progress_bar: bool = False,
) -> DataReport:
    """Read every image of a data set (a folder, a list, or shards, as for a training) and report on it; write a
    contact sheet of up to 24 samples, drawn with a fixed seed, to `sheet`.

    An image is tiny when its short side has fewer pixels than `min_side`. Raises DataError for a data set that cannot
    be found or listed, and for a sheet of an unknown suffix; broken images are in the report.
    """
    if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
        raise DataError(f"{sheet}: unknown image suffix {sheet.suffix!r} for the samples. Use .png.")
    if sheet is not None and is_inside(sheet, data):
        raise DataError(f"{sheet} would be in the data set, and in the next training. Choose a place outside {data}.")
    missing: list[str] = []
    total: int | None = None
    found: ScanResult | None = None
    if is_shards(data):
        entries = _shard_entries(expand_shards(data), missing)
    else:
        found = scan(Path(data), root)
        missing += found.missing
        entries = [_file_entry(example, example.text) for example in found.examples]
        entries += [_file_entry(example, None) for example in found.without_caption]
        total = len(entries)
        if not total and not found.unreadable:
            raise DataError(found.nothing)
    facts: list[ImageFacts] = []
    samples: dict[int, ImageFacts] = {}
    with ThreadPoolExecutor(threads) as pool:  # Pillow's decoders run beside each other
        results = _in_turn(pool, inspect_image, entries)
        for fact in tqdm(results, "images", total, disable=not progress_bar):
            _sample(samples, fact, len(facts))
            facts.append(dataclasses.replace(fact, thumbnail=None, reference=None))
    if sheet is not None and samples:
        contact_sheet([_cell(samples[place]) for place in sorted(samples)], sheet)
    return make_report(
        str(data), facts, missing, min_side, str(sheet) if sheet is not None and samples else None, found
    )


def is_inside(path: Path, data: str | Path) -> bool:
    """Whether a file or folder would be a part of a data set's folder."""
    return Path(data).is_dir() and path.resolve().is_relative_to(Path(data).resolve())


def inspect_image(entry: DataEntry | DataError) -> ImageFacts:
    """Read and decode an image, and its references, entirely."""
    if isinstance(entry, DataError):
        return ImageFacts("", None, error=str(entry))
    facts = ImageFacts(entry.name, entry.text, has_reference=bool(entry.references), has_face=entry.has_face)
    try:
        data = entry.read()
        size, thumbnail = _decode(data)
        references = [_decode(read())[1] for read in entry.references]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return dataclasses.replace(facts, error=f"{entry.name}: {why_unreadable(error)}")
    return dataclasses.replace(
        facts,
        size=size,
        digest=hashlib.sha256(data).hexdigest(),
        look=image_hash(thumbnail) if can_hash_images() else None,
        thumbnail=thumbnail,
        reference=references[0] if references else None,
    )


def _decode(data: bytes) -> tuple[tuple[int, int], Image.Image]:
    image, size = open_rgb(io.BytesIO(data))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return size, image


def _file_entry(example: Example, text: str | None) -> DataEntry:
    image, *references = (file for file in (example.image, *example.references) if isinstance(file, Path))
    return DataEntry(
        str(image),
        image.read_bytes,
        text,
        tuple(reference.read_bytes for reference in references),
        example.face_id_embed is not None,
    )


def _shard_entries(shards: Sequence[str], missing: list[str]) -> Iterator[DataEntry | DataError]:
    for shard in shards:
        for raw in raw_samples(shard, missing.append):
            try:
                sample = parse_sample(raw)
            except DataError as error:
                yield error
                continue
            yield DataEntry(
                f"{shard_name(shard)}/{raw['__key__']}",
                _giving(sample.image),
                sample.text,
                tuple(_giving(reference) for reference in sample.references),
                sample.face_id_embed is not None,
            )


def _giving(data: bytes) -> Read:
    return lambda: data


def _in_turn(
    pool: ThreadPoolExecutor, function: Callable[[Thing], Result], things: Iterable[Thing]
) -> Iterator[Result]:
    """Results in the order of the things, of which only a few are taken ahead: all may not fit into memory."""
    waiting: deque[Future[Result]] = deque()
    for thing in things:
        waiting.append(pool.submit(function, thing))
        if len(waiting) > _WAITING:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sample(samples: dict[int, ImageFacts], fact: ImageFacts, seen: int) -> None:
    """Keep it or not, so that in the end each had the same chance (Vitter's algorithm R)."""
    place = seen if seen < SAMPLES else random.Random(f"sheet {seen}").randrange(seen + 1)
    if place < SAMPLES and fact.thumbnail is not None:
        samples[place] = fact


def _cell(fact: ImageFacts) -> Cell:
    assert fact.thumbnail is not None and fact.size is not None
    title = f"{fact.size[0]}x{fact.size[1]} {Path(fact.name).name}"
    return Cell(fact.thumbnail, title, "(no caption)" if fact.text is None else fact.text, fact.reference)
