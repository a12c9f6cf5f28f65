"""The examples of a data set: images, captions and references, from the layouts that people have."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from ..settings.fields import LIST_SUFFIXES
from .files import TarMember, read_text, whole_text
from .folders import ARCHIVE_SUFFIXES, FolderListing, list_folder
from .images import StoredImage
from .lists import METADATA_NAMES, misspelt_keys, read_list

_NAMED = 5  # problems in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableEntry:
    """A face embedding in a table of many."""

    table: Path
    key: str


@dataclass(frozen=True, eq=False)
class Example:
    """An image to learn, its caption, and its image prompts.

    `references` are other images of the same subject, of which one is drawn in each epoch; without any, the image is
    its own reference. `size` is (width, height) if the data set names it.
    """

    image: StoredImage
    text: str
    references: tuple[StoredImage, ...] = ()
    face_id_embed: Path | TarMember | TableEntry | None = None
    size: tuple[int, int] | None = None

    @property
    def prompt_image(self) -> StoredImage:
        """The image prompt of a validation or an evaluation: the first reference, or the image itself."""
        return self.references[0] if self.references else self.image

    @property
    def name(self) -> str:
        """For messages."""
        return f"an image in memory ({self.text!r})" if isinstance(self.image, Image.Image) else str(self.image)

    @property
    def files(self) -> list[Path]:
        """All files on disk."""
        return [f for f in (self.image, *self.references, self.face_id_embed) if isinstance(f, Path)]


@dataclass(eq=False)
class ScanResult:
    """The examples of a data set, and why other images are left out."""

    examples: list[Example] = field(default_factory=list[Example])
    without_caption: list[Example] = field(default_factory=list[Example])
    missing: list[str] = field(default_factory=list[str])  # files that a list names, with the line
    unreadable: list[str] = field(default_factory=list[str])  # captions and rows of a list, with the reason
    unused: list[str] = field(default_factory=list[str])  # caption files, with the reason
    ignored: list[str] = field(default_factory=list[str])  # sentences about other files, and misspelt keys of a list
    empty: str = ""  # the error message if there is no example


def find_examples(path: Path, root: Path | None = None, require_caption: bool = True) -> list[Example]:
    """List the examples of a data set, in a fixed order, without opening an image.

    `path` is one of: a folder of images with their captions (`cat.png` and `cat.txt` or `cat.caption`), including
    sub folders; a folder with a `metadata.jsonl` or `metadata.csv`, or such a file, with one `{"file_name": ...,
    "text": ...}` per line; the original trainer's JSON list `[{"image_file": ..., "text": ...}]`. Rows of a list may
    name one or more other prompt images under "reference", the file of a face embedding under "id_embed_file", and the
    image's "width" and "height". File names are relative to `root`, by default the list's folder.

    Images without a caption, unless `require_caption` is off, and rows with a missing file are left out. A warning
    names them and the files that are not read. Raises DataError when nothing is left, and for rows and
    captions that cannot be read, all in one message.
    """
    result = scan(path, root)
    if result.unreadable:
        count = len(result.unreadable)
        many = f"{path}: {count:,} captions or rows are unreadable. " if count > 1 else ""
        raise DataError(many + _first(result.unreadable))
    examples = result.examples
    if not require_caption:
        examples = sorted(examples + result.without_caption, key=lambda example: example.name)
    if not examples:
        raise DataError(result.empty)
    notes: list[str] = []
    if require_caption and (left_out := result.without_caption):
        count = f"{len(left_out):,} of {len(examples) + len(left_out):,} images"
        notes.append(f"{count} have no caption and are left out, such as {left_out[0].name}.")
    if missing := result.missing:
        count = f"{len(missing):,} of {len(examples) + len(missing):,} rows"
        notes.append(f"{count} name a file that does not exist and are left out, such as {missing[0]}.")
    if result.unused:
        notes.append(f"Unused caption files: {len(result.unused):,}, such as {result.unused[0]}.")
    if no_text := [example.name for example in result.examples if not example.text.strip()]:
        notes.append(f"Empty captions: {len(no_text):,}, such as that of {no_text[0]}.")
    notes += result.ignored
    if notes:
        log.warning("%s: %s", path, _first(notes))
    return examples


def scan(path: Path, root: Path | None = None) -> ScanResult:
    """Everything in a data set, for `find_examples` and `ipadapter data check`.

    Raises DataError for a path or a list that cannot be read.
    """
    if not path.exists():
        advice = "A pattern of shards ends in .tar." if set("*?[{") & set(path.name) else "Set data to your images."
        raise DataError(f"{path}: no such file or folder. {advice}")
    if path.is_dir():
        return _scan_folder(path, root)
    if path.suffix.lower() in LIST_SUFFIXES:
        return _scan_list(path, root)
    raise DataError(f"{path}: expected a folder, a list ({', '.join(LIST_SUFFIXES)}) or .tar shards.")


def fingerprint(examples: Iterable[Example], root: Path | None = None) -> str:
    """16 hex digits of all names (relative to `root`) and captions. They tell data sets apart, but do not notice
    edited pixels.
    """
    digest = hashlib.sha256()
    for example in examples:
        files = (example.image, *example.references, example.face_id_embed)
        for part in (example.text, *(relative_name(file, root) for file in files)):
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def relative_name(file: StoredImage | TableEntry | None, root: Path | None) -> str:
    """A file's name relative to `root`, so that the data set may be moved; "" for an image in memory."""
    if isinstance(file, TableEntry):
        return f"{relative_name(file.table, root)}:{file.key}"
    if isinstance(file, TarMember):
        return f"{file.archive.name}/{file.member}"
    if not isinstance(file, Path):
        return ""
    return file.relative_to(root).as_posix() if root is not None and file.is_relative_to(root) else file.name


def _scan_folder(folder: Path, root: Path | None) -> ScanResult:
    metadata = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(metadata) > 1:
        raise DataError(f"{folder} holds {' and '.join(METADATA_NAMES)}. Keep one, or set data to one of the files.")
    listing = list_folder(folder)
    if metadata:
        result = _scan_list(metadata[0], root)
        result.ignored += _not_in_list(result, metadata[0], listing)
        return result
    pairs, unused = listing.pairs()
    result = ScanResult(unused=unused, ignored=listing.ignored())
    for image, caption in pairs:
        if caption is None:
            result.without_caption.append(Example(image, ""))
            continue
        try:
            result.examples.append(Example(image, read_text(caption, "a caption").strip()))
        except DataError as error:
            result.unreadable.append(str(error))
    result.empty = _nothing_in(folder, listing, result.ignored)
    return result


def _nothing_in(folder: Path, listing: FolderListing, ignored: Sequence[str]) -> str:
    images, captions = len(listing.images), len(listing.captions)
    archives = sum(file.suffix.lower() in ARCHIVE_SUFFIXES for file in listing.others)
    if not images + captions and archives:
        return f"{folder}: found no images but {archives} .tar files. To read shards, set data='{folder}/*.tar'."
    if not images + captions + len(listing.others):
        return f"{folder}: an empty folder. Put images into it, each with a caption: cat.png and cat.txt."
    found = f"{folder}: found {images} images and {captions} captions, but no image with a caption."
    advice = "Give each image a caption (cat.txt for cat.png), or put a metadata.jsonl into the folder."
    return " ".join([found, *ignored[:_NAMED], advice])


def _not_in_list(result: ScanResult, metadata: Path, listing: FolderListing) -> list[str]:
    """Sentences about the files of a folder that its list does not name."""
    used = {metadata, *(file for example in result.examples for file in example.files)}
    unlisted = [file for file in listing.images if file not in used]
    captions = [file for file in listing.captions if file not in used]
    sentences = listing.ignored(used)
    if unlisted and not result.unreadable:
        sentences.append(f"Not in {metadata.name}: {len(unlisted):,} images, such as {unlisted[0]}.")
    if captions:
        sentences.append(f"Caption files are ignored, {len(captions):,} of them: captions come from {metadata.name}.")
    return sentences


def _scan_list(file: Path, root: Path | None) -> ScanResult:
    folder = root if root is not None else file.parent
    image_key = "image_file" if file.suffix.lower() == ".json" else "file_name"
    result, keys = ScanResult(), Counter[str]()
    for location, values in read_list(file):
        try:
            if isinstance(values, DataError):
                raise values
            example = _from_row(values, image_key, folder)
            keys.update(values.keys())
        except DataError as error:
            result.unreadable.append(f"{location}: {error}")
            continue
        missing = next((f for f in example.files if not f.is_file()), None)
        if missing is None:
            result.examples.append(example)
        else:
            result.missing.append(f"{missing} ({location})")
    result.ignored = misspelt_keys(keys)
    count = len(result.missing)
    what = f"none of its {count} images exists, such as {result.missing[0]}" if count else "it is empty"
    result.empty = f"{file}: {what}. File names are relative to {folder}; data_root changes that."
    return result


def _from_row(values: Any, image_key: str, folder: Path) -> Example:
    if not isinstance(values, Mapping):
        raise DataError(f"expected an object with {image_key!r} and 'text', found {values!r:.60}.")

    def text(key: str, is_name: bool = True) -> str:
        if not isinstance(value := values.get(key), str):
            keys = ", ".join(map(str, values))
            raise DataError(f"{key!r} must be text, found {value!r:.60} (keys: {keys:.100}).")
        return whole_text(value, repr(key), is_name=is_name)

    image, caption = folder / text(image_key), text("text", is_name=False)
    references = values.get("reference") or ()
    if isinstance(references, str):
        references = (references,)
    if not isinstance(references, list | tuple) or not all(isinstance(reference, str) for reference in references):
        raise DataError(f"'reference' must be a file name or a list of them, found {references!r:.60}.")
    for reference in references:
        whole_text(reference, "'reference'", is_name=True)
    face = None
    if values.get("id_embed_file") is not None:
        name = text("id_embed_file")
        # The original trainer opens it relative to the working directory (tutorial_train_faceid.py).
        face = Path(name) if Path(name).is_file() and not (folder / name).is_file() else folder / name
    width, height = values.get("width"), values.get("height")
    size = (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None
    return Example(image, caption, tuple(folder / reference for reference in references), face, size)


def _first(sentences: Sequence[str]) -> str:
    rest = len(sentences) - _NAMED
    more = f" And {rest:,} more: `ipadapter data check` lists all." if rest > 0 else ""
    return " ".join(sentences[:_NAMED]) + more
