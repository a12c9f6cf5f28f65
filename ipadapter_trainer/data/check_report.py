"""The report of `ipadapter data check`."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from PIL import Image

from .buckets import size_notes
from .duplicates import ImageHash, can_hash_images, duplicates, near_duplicates
from .examples import ScanResult
from .images import Size

TOKENS = 77  # CLIP's text length, including the start and end token
_NAMED = 5  # images of a list
_BUCKET_STEP, _BATCH_SIZE = 64, 8  # of a usual training
_BAR = 40  # characters of the longest bar
_SHAPES = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
_WIDTH = 17  # characters of the names at the left


@dataclass(frozen=True, eq=False)
class ImageInfo:
    """One image of the data set. `text` is None without a caption, `error` the reason why it cannot be used."""

    name: str
    text: str | None
    has_reference: bool = False
    has_face: bool = False
    error: str | None = None
    size: Size | None = None
    digest: str | None = None
    hash: ImageHash | None = None
    thumbnail: Image.Image | None = None


@dataclass(frozen=True)
class Range:
    """Minimum, median and maximum."""

    min: int
    median: int
    max: int


@dataclass(frozen=True)
class DataReport:
    """Contents and faults of a data set. `usable` images can be read and have a caption."""

    data: str
    images: int
    usable: int
    references: int  # images that name another image as the prompt
    faces: int  # images that name a face embedding
    missing: list[str]  # files that a list names, or shards that end early
    unreadable: list[str]  # captions and rows of a list
    ignored: list[str]  # a sentence for each type of file that is not read
    unused_captions: list[str]
    empty_captions: list[str]
    broken: list[str]
    without_caption: list[str]
    tiny: list[str]
    duplicates: list[list[str]]
    near_duplicates: list[list[str]] | None  # None without imagehash
    repeated_captions: dict[str, int]  # captions of several images, with their number
    long_captions: list[str]  # names of images with more tokens than the text encoder takes, roughly
    caption_tokens: Range | None
    short_side: Range | None
    min_side: int
    size_notes: list[str]  # for a training at `min_side` pixels
    shapes: dict[str, int]  # number of images by the nearest ratio of width to height
    sheet: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def as_text(self) -> str:
        """The report with long lists cut."""
        lines = [("images", f"{self.images:,}, of which {self.usable:,} can be used")]
        if self.references:
            lines.append(("references", f"{self.references:,} images have another image as the prompt"))
        if self.faces:
            lines.append(("faces", f"{self.faces:,} images have a face embedding"))
        if (side := self.short_side) is not None:
            lines.append(("short side", f"{side.min:,} to {side.max:,} pixels, median {side.median:,}"))
        if (tokens := self.caption_tokens) is not None:
            lines.append(("captions", f"about {tokens.min} to {tokens.max} tokens, median {tokens.median}"))
        lines += self._faults()
        lines += [(f"at {self.min_side} px", note) for note in self.size_notes]
        if self.sheet is not None:
            lines.append(("samples", self.sheet))
        text = "\n".join(f"{name:<{_WIDTH}} {content}" for name, content in lines)
        return f"{self.data}\n{text}\n{self._histogram()}".rstrip()

    def _faults(self) -> list[tuple[str, str]]:
        lists = {
            "missing": self.missing,
            "broken": self.broken,
            "unreadable": self.unreadable,
            "without caption": self.without_caption,
            "empty captions": self.empty_captions,
            "unused captions": self.unused_captions,
            f"below {self.min_side} px": self.tiny,
            f"over {TOKENS} tokens": self.long_captions,
            "same file": [" = ".join(names) for names in self.duplicates],
            "nearly the same": [" ~ ".join(names) for names in self.near_duplicates or []],
            "same caption": [f"{count:,} x {text!r}" for text, count in self.repeated_captions.items()],
        }
        lines = [(name, _some(names)) for name, names in lists.items() if names]
        lines += [("ignored", sentence) for sentence in self.ignored]
        if self.near_duplicates is None:
            lines.append(("nearly the same", "not checked; pip install 'ip-adapter-kit[train]' installs imagehash"))
        return lines or [("faults", "none found")]

    def _histogram(self) -> str:
        if not self.shapes:
            return ""
        longest = max(self.shapes.values())
        bars = (f"  {name:<5} {'#' * -(-_BAR * count // longest)} {count:,}" for name, count in self.shapes.items())
        return "width : height\n" + "\n".join(bars)


def make_report(
    data: str, infos: Sequence[ImageInfo], result: ScanResult, min_side: int, sheet: str | None = None
) -> DataReport:
    """Summarise all images, and the other files that `scan` found."""
    readable = [(info, info.size) for info in infos if info.size is not None]
    sizes = [size for _, size in readable]
    captions = [(info.name, info.text) for info in infos if info.text is not None]
    tokens = {name: approximate_tokens(text) for name, text in captions}
    same = duplicates((info.name, info.digest) for info, _ in readable)
    copies = {name for names in same for name in names[1:]}
    hashes = [(info.name, info.hash) for info, _ in readable if info.hash is not None and info.name not in copies]
    shapes = Counter(_shape(size) for size in sizes)
    return DataReport(
        data=data,
        images=len(infos),
        usable=sum(info.text is not None for info, _ in readable),
        references=sum(info.has_reference for info in infos),
        faces=sum(info.has_face for info in infos),
        missing=result.missing,
        unreadable=result.unreadable,
        ignored=result.ignored,
        unused_captions=result.unused,
        empty_captions=[name for name, text in captions if not text.strip()],
        broken=[info.error for info in infos if info.error is not None],
        without_caption=[info.name for info in infos if info.text is None and info.name],
        tiny=[f"{info.name} ({size[0]}x{size[1]})" for info, size in readable if min(size) < min_side],
        duplicates=same,
        near_duplicates=near_duplicates(hashes) if can_hash_images() else None,
        repeated_captions={
            text: count for text, count in Counter(text for _, text in captions).most_common() if count > 1 and text
        },
        long_captions=[name for name, count in tokens.items() if count > TOKENS],
        caption_tokens=_range(tokens.values()),
        short_side=_range([min(size) for size in sizes]),
        min_side=min_side,
        size_notes=size_notes(sizes, len(sizes), min_side, min(_BUCKET_STEP, min_side), _BATCH_SIZE),
        shapes={name: shapes[name] for name in _SHAPES if shapes[name]},
        sheet=sheet,
    )


def approximate_tokens(text: str) -> int:
    """CLIP tokens of a caption, roughly: words and signs, several for a long word, and the start and end token."""
    return 2 + sum(1 + len(word) // 10 for word in re.findall(r"\w+|[^\w\s]", text))


def _range(numbers: Collection[int]) -> Range | None:
    return Range(min(numbers), int(statistics.median_low(numbers)), max(numbers)) if numbers else None


def _shape(size: Size) -> str:
    def distance(name: str) -> float:
        width, height = name.split(":")
        return abs(log(int(width) / int(height)) - log(size[0] / size[1]))

    return min(_SHAPES, key=distance)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    items = "".join(f"\n{'':<{_WIDTH}} - {' '.join(name.split())}" for name in names[:_NAMED])
    more = f"\n{'':<{_WIDTH}}   and {rest:,} more" if rest > 0 else ""
    return f"{len(names):,}{items}{more}"
