"""Find images and captions on disk, in the layouts that people have."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..errors import DataError
from .file_kinds import read_text
from .folders import FolderListing, list_folder
from .images import StoredImage
from .lists import LIST_SUFFIXES, METADATA_NAMES, Row, read_list
from .lists import field as text_field
from .tar_member import PackedFile

_NAMED = 5  # of what is wrong, in a line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableEntry:
    """A face embedding in a table of many."""

    table: Path
    key: str


@dataclass(frozen=True, eq=False)
class Example:
    """An image to learn, its caption, and what its image prompt is made of.

    `references` are other images that show the same, of which each use draws one; none: the image itself.
    `face_id_embed` is where a face embedding is. `size` is (width, height) where the data set says it.
    """

    image: StoredImage
    text: str
    references: tuple[StoredImage, ...] = ()
    face_id_embed: Path | PackedFile | TableEntry | None = None
    size: tuple[int, int] | None = None

    @property
    def prompt_image(self) -> StoredImage:
        """The image prompt of a validation or an evaluation: the first reference, or the image itself."""
        return self.references[0] if self.references else self.image

    @property
    def name(self) -> str:
        """For messages."""
        return f"an image in memory ({self.text!r})" if isinstance(self.image, Image.Image) else str(self.image)


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A data set: its examples, and what keeps other images out of it."""

    examples: list[Example]
    without_caption: list[Example]
    missing: list[str]  # files that a list names, with the place in the list
    nothing: str  # what to say when there is no example
    unreadable: list[str] = field(default_factory=list[str])  # a sentence for each row or caption
    unused: list[str] = field(default_factory=list[str])  # caption files, with the reason
    ignored: list[str] = field(default_factory=list[str])  # a sentence for each kind of other file

    def check_readable(self, path: Path) -> None:
        """Raises DataError for captions and rows that cannot be read, all in one."""
        if len(self.unreadable) > 1:
            count = f"{path}: {len(self.unreadable):,} captions or rows are unreadable."
            raise DataError(f"{count} {_some(self.unreadable)}")
        if self.unreadable:
            raise DataError(self.unreadable[0])


def find_examples(path: Path, root: Path | None = None, require_caption: bool = True) -> list[Example]:
    """List the examples of a data set, in a fixed order, without opening an image.

    `path` is one of: a folder of images, each with its caption beside it (`cat.png`, `cat.txt` or `cat.caption`),
    sub folders included; a folder with a `metadata.jsonl` or `metadata.csv`, or such a file: one `{"file_name": ...,
    "text": ...}` a line; the original trainer's JSON list `[{"image_file": ..., "text": ...}]`. Rows of a list may name
    another prompt image, or several, under "reference", the file of a face embedding under "id_embed_file", and the
    image's "width" and "height". File names are relative to `root`, by default the list's folder.

    Images without a caption, unless `require_caption` is off, and rows of which a file does not exist are left out
    with a warning; another one names the files that are not read. Raises DataError when nothing is left, and for all
    rows and captions that cannot be read.
    """
    found = scan(path, root)
    found.check_readable(path)
    examples = found.examples
    if not require_caption and found.without_caption:
        examples = sorted(examples + found.without_caption, key=lambda example: example.name)
    if not examples:
        raise DataError(found.nothing)
    if require_caption and found.without_caption:
        count, without = len(found.without_caption), found.without_caption[0].name
        log.warning(
            "%d of %d images have no caption and are left out, such as %s", count, len(examples) + count, without
        )
    if found.missing:
        count = len(found.missing)
        log.warning(
            "%d of %d rows name a file that does not exist and are left out, such as %s",
            count,
            len(examples) + count,
            found.missing[0],
        )
    rest: list[str] = []
    if found.unused:
        rest.append(f"Unused caption files: {len(found.unused):,}, such as {found.unused[0]}.")
    empty = [example.name for example in found.examples if not example.text.strip()]
    if empty:
        rest.append(f"Empty captions: {len(empty):,}, such as that of {empty[0]}.")
    rest += found.ignored
    if rest:
        log.warning("%s: %s", path, _some(rest))
    return examples


def scan(path: Path, root: Path | None = None) -> ScanResult:
    """What `find_examples` chooses from. Raises DataError for a path or a list that cannot be read."""
    path = Path(path)
    if not path.exists():
        shards = "A pattern of shards ends in .tar." if set("*?[{") & set(path.name) else "Set data to your images."
        raise DataError(f"{path}: no such file or folder. {shards}")
    if path.is_dir():
        return _from_folder(path, root)
    if path.suffix.lower() in LIST_SUFFIXES:
        return _from_list(path, root)
    *others, last = LIST_SUFFIXES
    raise DataError(
        f"{path}: expected a folder, a list ({', '.join(others)} or {last}) or .tar shards, not a "
        f"{path.suffix or 'plain'} file."
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


def relative_name(image: StoredImage | TableEntry | None, root: Path | None) -> str:
    """A file's name relative to `root`, so that the data set may move; "" for an image in memory."""
    if isinstance(image, TableEntry):
        return f"{relative_name(image.table, root)}:{image.key}"
    if isinstance(image, PackedFile):
        return f"{image.archive.name}/{image.member}"
    if not isinstance(image, Path):
        return ""
    return image.relative_to(root).as_posix() if root is not None and image.is_relative_to(root) else image.name


def _from_folder(folder: Path, root: Path | None) -> ScanResult:
    metadata = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(metadata) > 1:
        raise DataError(f"{folder} holds {' and '.join(METADATA_NAMES)}. Keep one, or set data to one of the files.")
    listing = list_folder(folder)
    if metadata:
        return _with_rest_of_folder(_from_list(metadata[0], root), metadata[0], listing)
    pairs, unused = listing.pairs()
    found = ScanResult([], [], [], "", unused=unused, ignored=listing.ignored())
    for image, caption in pairs:
        if caption is None:
            found.without_caption.append(Example(image, ""))
            continue
        try:
            found.examples.append(Example(image, read_text(caption, "a caption").strip()))
        except DataError as error:
            found.unreadable.append(str(error))
    return dataclasses.replace(found, nothing=_nothing_in(folder, listing, found))


def _nothing_in(folder: Path, listing: FolderListing, found: ScanResult) -> str:
    images, captions, archives = len(listing.images), len(listing.captions), len(listing.archives)
    if not images + captions and archives:
        return f"{folder}: found no images but {archives} .tar files. To read shards, set data='{folder}/*.tar'."
    if not images + captions + len(listing.others):
        return f"{folder}: an empty folder. Put images into it, each with a caption: cat.png and cat.txt."
    return " ".join(
        [
            f"{folder}: found {images} images and {captions} captions, but no image with a caption.",
            *found.ignored[:_NAMED],
            "Put cat.txt beside cat.png, or a metadata.jsonl into the folder.",
        ]
    )


def _with_rest_of_folder(found: ScanResult, metadata: Path, listing: FolderListing) -> ScanResult:
    """Names what the folder of a list holds beside it."""
    examples = found.examples
    used = {metadata, *(f for e in examples for f in (e.image, *e.references, e.face_id_embed) if isinstance(f, Path))}
    unlisted = [file for file in listing.images if file not in used]
    captions = [file for file in listing.captions if file not in used]
    sentences = listing.ignored(used)
    if unlisted and not found.unreadable:
        sentences.append(f"Not in {metadata.name}: {len(unlisted):,} images, such as {unlisted[0]}.")
    if captions:
        sentences.append(f"Caption files are ignored, {len(captions):,} of them: captions come from {metadata.name}.")
    return dataclasses.replace(found, ignored=sentences)


def _from_list(file: Path, root: Path | None) -> ScanResult:
    folder = root if root is not None else file.parent
    rows, unreadable = read_list(file)
    found = ScanResult([], [], [], "", unreadable)
    for row in rows:
        try:
            example = _from_row(row, folder)
        except DataError as error:
            unreadable.append(str(error))
            continue
        files = (example.image, *example.references, example.face_id_embed)
        absent = next((f for f in files if isinstance(f, Path) and not f.is_file()), None)
        if absent is None:
            found.examples.append(example)
        else:
            found.missing.append(f"{absent} ({row.where})")
    what = f"none of its {len(rows)} images exists, such as {found.missing[0]}" if found.missing else "it is empty"
    nothing = f"{file}: {what}. File names are relative to {folder}; data_root changes that."
    return dataclasses.replace(found, nothing=nothing)


def _from_row(row: Row, folder: Path) -> Example:
    references = row.values.get("reference") or ()
    if isinstance(references, str):
        references = (references,)
    if not isinstance(references, list | tuple) or not all(isinstance(reference, str) for reference in references):
        raise DataError(f"{row.where}: 'reference' must be a file name or a list of them, found {references!r:.60}.")
    has_face = row.values.get("id_embed_file") is not None
    width, height = row.values.get("width"), row.values.get("height")
    return Example(
        folder / row.image,
        row.text,
        tuple(folder / reference for reference in references),
        _face_file(folder, text_field(row.values, "id_embed_file", row.where)) if has_face else None,
        (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None,
    )


def _face_file(folder: Path, name: str) -> Path:
    """Relative to the images' folder; or as it stands, as tutorial_train_faceid.py opens it."""
    return folder / name if (folder / name).is_file() or not Path(name).is_file() else Path(name)


def _some(names: Sequence[str]) -> str:
    """The first of many, and how many more there are."""
    more = f" And {len(names) - _NAMED:,} more: `ipadapter data check` lists all." if len(names) > _NAMED else ""
    return " ".join(names[:_NAMED]) + more
