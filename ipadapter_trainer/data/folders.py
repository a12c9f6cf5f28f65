"""The files of a folder of images: which are read, and which are ignored."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from .images import IMAGE_SUFFIXES
from .lists import METADATA_NAMES

CAPTION_SUFFIXES = (".txt", ".caption")  # in order of preference
ARCHIVE_SUFFIXES = (".tar", ".tgz")
_SYSTEM = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")
_ADVICE = {
    "convert to JPEG or PNG": ".heic .heif .hif .jxl .jp2 .psd .svg .tga .exr .hdr .ico .pdf .raw .dng .cr2 .cr3 .nef "
    ".arw .orf .rw2 .raf .xcf",
    "Pillow 11.3 or newer reads it": ".avif",
    "save frames of it as images": ".mp4 .mov .avi .mkv .webm .m4v",
    "unpack it": ".zip .7z .rar .gz .zst",
    "to read shards, set data='FOLDER/*.tar'": " ".join(ARCHIVE_SUFFIXES),
    "to read a list, set data to the file, or name it metadata": ".json .jsonl .csv",
    "write it as metadata.jsonl": ".parquet .xlsx .tsv",
}
_ADVICE_OF = {suffix: advice for advice, suffixes in _ADVICE.items() for suffix in suffixes.split()}


@dataclass(frozen=True, eq=False)
class FolderListing:
    """The files of a folder and its sub folders, in a fixed order. Hidden and system files are left out."""

    images: list[Path] = field(default_factory=list[Path])
    captions: list[Path] = field(default_factory=list[Path])
    others: list[Path] = field(default_factory=list[Path])
    broken_links: list[Path] = field(default_factory=list[Path])
    special: list[Path] = field(default_factory=list[Path])  # pipes, sockets and devices

    def pairs(self) -> tuple[list[tuple[Path, Path | None]], list[str]]:
        """Each image with its caption file, and the unused caption files, with the reason."""
        by_name = {(file.with_suffix(""), file.suffix.lower()): file for file in self.captions}
        pairs: list[tuple[Path, Path | None]] = []
        used: dict[Path, Path] = {}  # by the name without suffix
        for image in self.images:
            stem = image.with_suffix("")
            caption = next((by_name[stem, s] for s in CAPTION_SUFFIXES if (stem, s) in by_name), None)
            pairs.append((image, caption))
            if caption is not None:
                used[stem] = caption
        unused: list[str] = []
        for file in self.captions:
            read = used.get(file.with_suffix(""))
            if read != file:
                unused.append(f"{file} ({'no image of this name' if read is None else f'{read.name} is read'})")
        return pairs, unused

    def ignored(self, used: Collection[Path] = ()) -> list[str]:
        """A sentence for each suffix of the other files, without those that a list uses."""
        others = [file for file in self.others if file not in used]
        nested = [file for file in others if file.name.lower() in METADATA_NAMES]
        counts = Counter(file.suffix.lower() for file in others if file not in nested)
        sentences = [
            f"{file} is not read. Set data={file.parent} to read it, or move it to the top of the folder."
            for file in nested
        ]
        for suffix, number in sorted(counts.items(), key=lambda count: (-count[1], count[0])):
            noun, verb = ("file", "is") if number == 1 else ("files", "are")
            name = f"{suffix} {noun}" if suffix else f"{noun} without a suffix"
            advice = f": {_ADVICE_OF[suffix]}" if suffix in _ADVICE_OF else ""
            sentences.append(f"{number:,} {name} {verb} ignored{advice}.")
        for what, files in (("Broken links", self.broken_links), ("Pipes, sockets or devices", self.special)):
            if files:
                sentences.append(f"{what}: {len(files):,}, such as {files[0]}.")
        return sentences


def list_folder(folder: Path) -> FolderListing:
    """List a folder. Links to folders elsewhere are followed, each folder once.

    Raises OSError for a folder that cannot be read.
    """
    listing, seen, top = FolderListing(), set[str](), folder.resolve()

    def is_elsewhere(link: Path) -> bool:
        return not (link.resolve().is_relative_to(top) or top.is_relative_to(link.resolve()))

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [
            name
            for name in folders
            if not _is_hidden(name) and (not (link := Path(parent, name)).is_symlink() or is_elsewhere(link))
        ]
        for file in (Path(parent, name) for name in names if not _is_hidden(name)):
            if not file.exists():
                listing.broken_links.append(file)
            elif not file.is_file():
                listing.special.append(file)
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                listing.images.append(file)
            elif file.suffix.lower() in CAPTION_SUFFIXES:
                listing.captions.append(file)
            else:
                listing.others.append(file)
    for files in (listing.images, listing.captions, listing.others, listing.broken_links, listing.special):
        files.sort()
    return listing


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM
