"""What `ipadapter data check` says."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from PIL import Image

from .duplicates import ImageHash, can_hash_images, near_duplicates, same
from .examples import ScanResult
from .images import Size
from .sizes import size_notes

TOKENS = 77  # that CLIP's text encoders take, the two ends included
_NAMED = 5  # of the images in a list
_BUCKET_STEP, _BATCH = 64, 8  # of a usual training
_BAR = 40  # characters of the longest one
_SHAPES = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """What was seen of one image."""

    name: str
    text: str | None  # None: no caption
    has_reference: bool = False
    has_face: bool = False
    error: str | None = None
    size: Size | None = None
    digest: str | None = None
    look: ImageHash | None = None
    thumbnail: Image.Image | None = None
    reference: Image.Image | None = None


@dataclass(frozen=True)
class Range:
    """The least, the middle and the greatest of many numbers."""

    least: int
    middle: int
    greatest: int


@dataclass(frozen=True)
class DataReport:
    """The contents and the faults of a data set. `usable` images can be read and have a caption."""

    data: str
    images: int
    usable: int
    references: int  # images with another image as the prompt
    faces: int  # images with a face embedding of their own
    missing: list[str]  # files that are listed, or shards that end early
    unreadable: list[str]  # captions and rows of a list
    ignored: list[str]  # a sentence for each kind of file that is not read
    unused_captions: list[str]
    empty_captions: list[str]
    broken: list[str]
    without_caption: list[str]
    tiny: list[str]
    duplicates: list[list[str]]
    near_duplicates: list[list[str]] | None  # None: not looked for
    repeated_captions: dict[str, int]  # how often each comes, where more than once
    long_captions: list[str]  # names of images with more tokens than the text encoder takes, roughly
    caption_tokens: Range | None
    short_side: Range | None
    min_side: int
    size_notes: list[str]  # about a training at `min_side` pixels
    shapes: dict[str, int]  # images by the nearest ratio of width to height
    sheet: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def as_text(self) -> str:
        """For people; long lists are cut."""
        lines = [("images", f"{self.images:,}, of which {self.usable:,} can be used")]
        if self.references:
            lines.append(("references", f"{self.references:,} images have another one as the prompt"))
        if self.faces:
            lines.append(("faces", f"{self.faces:,} images name a face embedding"))
        if self.short_side is not None:
            side = self.short_side
            lines.append(
                ("short side", f"{side.least:,} to {side.greatest:,} pixels, half of them up to {side.middle:,}")
            )
        if self.caption_tokens is not None:
            tokens = self.caption_tokens
            lines.append(
                ("captions", f"about {tokens.least} to {tokens.greatest} tokens, half of them up to {tokens.middle}")
            )
        lines += self._faults()
        lines += [(f"at {self.min_side} px", note) for note in self.size_notes]
        if self.sheet is not None:
            lines.append(("samples", self.sheet))
        text = "\n".join(f"{name:<17} {content}" for name, content in lines)
        return f"{self.data}\n{text}\n{self._histogram()}".rstrip()

    def _faults(self) -> list[tuple[str, str]]:
        lists = [
            ("missing", self.missing),
            ("broken", self.broken),
            ("unreadable", self.unreadable),
            ("without caption", self.without_caption),
            ("empty captions", self.empty_captions),
            ("unused captions", self.unused_captions),
            (f"below {self.min_side} px", self.tiny),
            (f"over {TOKENS} tokens", self.long_captions),
            ("same file", [" = ".join(names) for names in self.duplicates]),
            ("nearly the same", [" ~ ".join(names) for names in self.near_duplicates or []]),
            ("same caption", [f"{count:,} x {text!r}" for text, count in self.repeated_captions.items()]),
        ]
        lines = [(name, _some(names)) for name, names in lists if names]
        lines += [("ignored", sentence) for sentence in self.ignored]
        if self.near_duplicates is None:
            lines.append(("nearly the same", "not looked for: pip install 'ip-adapter-kit[train]' brings imagehash"))
        return lines or [("faults", "none found")]

    def _histogram(self) -> str:
        if not self.shapes:
            return ""
        longest = max(self.shapes.values())
        bars = (f"  {name:<5} {'#' * -(-_BAR * count // longest)} {count:,}" for name, count in self.shapes.items())
        return "width : height\n" + "\n".join(bars)


def make_report(
    data: str,
    facts: Sequence[ImageFacts],
    missing: Sequence[str],
    min_side: int,
    sheet: str | None = None,
    found: ScanResult | None = None,
) -> DataReport:
    """Sum up the facts of all images, and what was `found` beside them."""
    read = [fact for fact in facts if fact.size is not None]
    sizes = [fact.size for fact in read if fact.size is not None]
    texts = [(fact.name, fact.text) for fact in facts if fact.text is not None]
    tokens = {name: approximate_tokens(text) for name, text in texts}
    captions = Counter(text for _, text in texts)
    duplicates = same((fact.name, fact.digest) for fact in read)
    copies = {name for names in duplicates for name in names[1:]}
    looks = [(fact.name, fact.look) for fact in read if fact.look is not None and fact.name not in copies]
    shapes = Counter(_shape(size) for size in sizes)
    return DataReport(
        data=data,
        images=len(facts),
        usable=sum(fact.text is not None for fact in read),
        references=sum(fact.has_reference for fact in facts),
        faces=sum(fact.has_face for fact in facts),
        missing=list(missing),
        unreadable=[] if found is None else found.unreadable,
        ignored=[] if found is None else found.ignored,
        unused_captions=[] if found is None else found.unused,
        empty_captions=[name for name, text in texts if not text.strip()],
        broken=[fact.error for fact in facts if fact.error is not None],
        without_caption=[fact.name for fact in facts if fact.text is None and fact.name],
        tiny=[f"{f.name} ({f.size[0]}x{f.size[1]})" for f in read if f.size is not None and min(f.size) < min_side],
        duplicates=duplicates,
        near_duplicates=near_duplicates(looks) if can_hash_images() else None,
        repeated_captions={text: count for text, count in captions.most_common() if count > 1 and text},
        long_captions=[name for name, count in tokens.items() if count > TOKENS],
        caption_tokens=_spread(list(tokens.values())),
        short_side=_spread([min(size) for size in sizes]),
        min_side=min_side,
        size_notes=size_notes(sizes, len(sizes), min_side, min(_BUCKET_STEP, min_side), _BATCH),
        shapes={name: shapes[name] for name in _SHAPES if shapes[name]},
        sheet=sheet,
    )


def approximate_tokens(text: str) -> int:
    """CLIP tokens of a caption, roughly: words and signs, a long word as several, and the two ends."""
    return 2 + sum(1 + len(word) // 10 for word in re.findall(r"\w+|[^\w\s]", text))


def _spread(numbers: Sequence[int]) -> Range | None:
    return Range(min(numbers), int(statistics.median_low(numbers)), max(numbers)) if numbers else None


def _shape(size: Size) -> str:
    def distance(name: str) -> float:
        width, height = name.split(":")
        return abs(log(int(width) / int(height)) - log(size[0] / size[1]))

    return min(_SHAPES, key=distance)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    shown = "".join(f"\n{'':<17} - {' '.join(name.split())}" for name in names[:_NAMED])
    more = f"\n{'':<17}   and {rest:,} more" if rest > 0 else ""
    return f"{len(names):,}{shown}{more}"
