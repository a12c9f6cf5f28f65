"""`ipadapter data check`: read a whole data set and report its contents and faults before a training does."""

from __future__ import annotations

import hashlib
import io
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..errors import DataError
from ..report.image_grid import draw_grid
from ..runtime.disk import whole_file
from .check_report import DataReport, ImageInfo, make_report
from .duplicates import can_hash_images, image_hash
from .examples import Example, ScanResult, TableEntry, scan
from .face_embeds import read_face_embed
from .images import check_image_file, open_rgb, why_unreadable
from .shard_files import expand_shards, is_shards
from .tar_samples import stream_samples

SAMPLES = 24  # on the sheet
_COLUMNS, _SIDE = 6, 192  # of the sheet; pixels
_THUMBNAIL = 256
_WAITING = 64  # images that are read ahead

Entry = tuple[Example, str | None] | DataError  # an example with its caption, or a sample that cannot be used
T = TypeVar("T")
Result = TypeVar("Result")


def check_data(
    data: str | Path,
    root: Path | None = None,
    *,
    min_side: int = 512,
    sheet: Path | None = None,
    progress_bar: bool = False,
) -> DataReport:
    """Read every image of a data set (a folder, a list, or shards, as for a training) and report on it. Write up to 24
    random images with their captions, always the same ones, to the image file `sheet`.

    An image is too small when its short side has fewer than `min_side` pixels. Raises DataError for a data set that
    cannot be found or listed and for a `sheet` in it, TrainerError for a `sheet` that is no image file; broken images
    are in the report.
    """
    if sheet is not None:
        check_image_file(sheet)
    if sheet is not None and is_inside(sheet, data):
        raise DataError(f"{sheet} would become part of the data set. Choose a folder outside {data}.")
    if is_shards(data):
        result, total = ScanResult(), None
        entries: Iterable[Entry] = _shard_entries(expand_shards(data), result.missing)
    else:
        result = scan(Path(data), root)
        entries = [(example, example.text) for example in result.examples]
        entries += [(example, None) for example in result.without_caption]
        total = len(entries)
        if not entries and not result.unreadable:
            raise DataError(result.empty)
    infos: list[ImageInfo] = []
    samples: dict[int, ImageInfo] = {}
    with ThreadPoolExecutor() as pool:  # Pillow's decoders run in parallel
        for info in tqdm(_map_in_order(pool, inspect_image, entries), "images", total, disable=not progress_bar):
            _sample(samples, info, len(infos))
            infos.append(replace(info, thumbnail=None))
    if sheet is not None and samples:
        _write_sheet([samples[i] for i in sorted(samples)], sheet)
    return make_report(str(data), infos, result, min_side, str(sheet) if sheet is not None and samples else None)


def is_inside(path: Path, data: str | Path) -> bool:
    """Whether a file or folder would be a part of a data set's folder."""
    return Path(data).is_dir() and path.resolve().is_relative_to(Path(data).resolve())


def inspect_image(entry: Entry) -> ImageInfo:
    """Read and decode an image, its references and its face embedding entirely."""
    if isinstance(entry, DataError):
        return ImageInfo("", None, error=str(entry))
    example, text = entry
    face = example.face_id_embed
    info = ImageInfo(example.name, text, bool(example.references), face is not None)
    assert not isinstance(example.image, Image.Image)
    try:
        data = example.image.read_bytes()
        image, size = open_rgb(io.BytesIO(data))
        references = [open_rgb(reference)[0] for reference in example.references]
        if face is not None and not isinstance(face, TableEntry):
            read_face_embed(face)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return replace(info, error=f"{example.name}: {why_unreadable(error)}")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    hashed = image_hash(image) if can_hash_images() else None
    if references:
        side = 2 * max(image.size) // 5
        inset = ImageOps.expand(ImageOps.contain(references[0], (side, side)), 2, "white")
        image.paste(inset, (image.width - inset.width, image.height - inset.height))
    return replace(info, size=size, digest=hashlib.sha256(data).hexdigest(), hash=hashed, thumbnail=image)


def _shard_entries(shards: Sequence[str], problems: list[str]) -> Iterator[Entry]:
    for sample in (sample for shard in shards for sample in stream_samples(shard, problems.append)):
        try:
            example = sample.example()
            yield example, example.text
        except DataError as error:
            yield error


def _map_in_order(pool: ThreadPoolExecutor, function: Callable[[T], Result], items: Iterable[T]) -> Iterator[Result]:
    """As `pool.map`, but only a few items are taken ahead: all may not fit into memory."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _WAITING:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sample(samples: dict[int, ImageInfo], info: ImageInfo, seen: int) -> None:
    """Keep image number `seen` or not, so that all images have the same chance (Vitter's algorithm R)."""
    slot = seen if seen < SAMPLES else random.Random(f"sheet {seen}").randrange(seen + 1)
    if slot < SAMPLES and info.thumbnail is not None:
        samples[slot] = info


def _write_sheet(samples: Sequence[ImageInfo], sheet: Path) -> None:
    columns = [samples[column::_COLUMNS] for column in range(min(_COLUMNS, len(samples)))]
    images = [("", [info.thumbnail for info in column if info.thumbnail is not None]) for column in columns]
    grid = draw_grid(images, side=_SIDE, captions=[[_caption(info) for info in column] for column in columns])
    with whole_file(sheet) as temporary:
        grid.save(temporary)


def _caption(info: ImageInfo) -> str:
    width, height = info.size or (0, 0)
    return f"{Path(info.name).name} {width}x{height}: {'(no caption)' if info.text is None else info.text}"
