"""Picture files -> RGB pictures, cuts of a given size, and tensors."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from ipadapter_core.file_types import START, type_of

from ..errors import DataError
from .file_kinds import IMAGES, fault
from .tar_member import PackedFile

Size = tuple[int, int]  # width, height
StoredImage = Image.Image | Path | PackedFile  # in memory, a file, or a file in a shard
ImageSource = StoredImage | IO[bytes]  # or an open file

# Pillow reads AVIF since 11.3, where it was built with libavif.
READS_AVIF = "avif" in features.modules and bool(features.check_module("avif"))
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *((".avif",) if READS_AVIF else ()),
)

_ON_ITS_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation
_DEPTHS = (255, 4095, 65535, 2**31 - 1)  # white of 8, 12, 16 and 31 bits
_UNCHECKED = ("PNG", "WEBP", "AVIF")  # their decoders draw black or grey where a file ends in zeros, and raise nothing
_ZERO_TAIL = 64  # bytes
_STRIP = 8  # a picture that covers its target with more than so many times its pixels

# Pillow warns at half of what it refuses; large photographs are fine.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class ImageError(ValueError):
    """A picture that cannot be used. The text does not name it: who opened it knows its name."""


class ImageCrop(NamedTuple):
    """A rectangle of a picture, scaled to a given size."""

    picture: Image.Image
    top_left: tuple[int, int]  # of the rectangle, in pixels of the whole picture at the same scale
    box: tuple[int, int, int, int]  # the same rectangle in the picture's own pixels: left, top, right, bottom


def open_rgb(picture: ImageSource, at_least: int | None = None) -> tuple[Image.Image, Size]:
    """The picture as `to_rgb` makes it, and the size of the file's picture when upright.

    With `at_least`, a JPEG may come at a half, a quarter or an eighth of its size, as long as its short side keeps
    that many pixels: its decoder does this several times faster than all pixels.

    Raises whatever Pillow's decoders raise, which is nearly anything, for a damaged file.
    """
    if isinstance(picture, Image.Image):
        rgb = to_rgb(picture)
        return rgb, rgb.size
    with open_lazily(picture) as opened:
        size = upright_size(opened)
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        if opened.format in _UNCHECKED and not _edge(picture, io.SEEK_END)[-_ZERO_TAIL:].strip(b"\0"):
            raise ImageError("ends in zeros, so its download is incomplete. Download it again.")
        return to_rgb(opened), size


def open_lazily(picture: Path | PackedFile | IO[bytes]) -> Image.Image:
    """The picture with nothing decoded but its header. Raises what Pillow raises, PictureError for a file that is
    known to be something else.
    """
    try:
        return Image.open(picture.open() if isinstance(picture, PackedFile) else picture)
    except (FileNotFoundError, PermissionError, IsADirectoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # also of a decoder that took another file for an image of its format
        start = _edge(picture, io.SEEK_SET)
        unidentified, found = isinstance(error, UnidentifiedImageError), type_of(start)
        if found is not None and (unidentified or found not in IMAGES):
            raise ImageError(fault(start, "JPEG, PNG, WebP or the like", IMAGES)) from error
        if unidentified:  # Pillow's text names the object in memory, another one in each run
            raise UnidentifiedImageError(f"cannot identify image file '{picture}'") from error
        raise


def _edge(picture: Path | PackedFile | IO[bytes], whence: int) -> bytes:
    """The first bytes of a file, or the last ones."""
    if isinstance(picture, Path | PackedFile):
        with picture.open("rb") if isinstance(picture, Path) else picture.open() as stream:
            return _edge(stream, whence)
    if whence == io.SEEK_END:
        picture.seek(max(0, picture.seek(0, io.SEEK_END) - START))
    else:
        picture.seek(0)
    return picture.read(START)


def why_unreadable(error: Exception) -> str:
    """What a decoder's error says, in a line."""
    if isinstance(error, UnidentifiedImageError):  # its text names the object in memory
        return "not a picture, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * cast('int', Image.MAX_IMAGE_PIXELS):,} pixels. Scale it down."
    if isinstance(error, DataError | ImageError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def upright_size(picture: Image.Image) -> Size:
    """Width and height after EXIF's rotation, without decoding a pixel."""
    # A PNG may hold its EXIF data behind the pixels; to ask for them would decode all.
    rotated = "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    return (picture.height, picture.width) if rotated else picture.size


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright, in RGB, transparency over white (dropping it would uncover whatever colour lies beneath).

    Raises PictureError for a picture without pixels, and for values whose range is unknown.
    """
    if 0 in picture.size:
        raise ImageError(f"an image of {picture.width}x{picture.height} pixels holds nothing.")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut off at 255: integers take the smallest depth that holds their
    values, as 12 bits may be stored in 16; floats reach to 1, or to an integer's white.
    """
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    whites = (1.001, *_DEPTHS) if picture.mode == "F" else _DEPTHS
    white = next((white for white in whites if high <= white), None)  # none for NaN, which no number is compared to
    # Sixteen times less than white is black: rather refused than taken for a dark picture.
    dark = (picture.mode == "F" and white == _DEPTHS[0]) or white == _DEPTHS[-1]
    if white is None or low < 0 or (dark and high * 16 < white):
        raise ImageError(
            f"its values reach from {low:g} to {high:g}, an unknown range. Scale them to 0...1 or 0...255."
        )
    white = 1.0 if white < 2 else white
    grey = np.minimum(values * (255.0 / white) + 0.5, 255).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def resize_and_crop(picture: Image.Image, size: Size, left: float = 0.5, top: float = 0.5) -> ImageCrop:
    """Scale the picture (bilinear, as the original does) so that it just covers `size`, and cut off the rest.

    `left` and `top` are the shares of the rest that lie before the cut: 0.5 cuts the centre.
    """
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(side, int(full * scale)) for side, full in zip(size, picture.size, strict=True))
    x, y = round((width - size[0]) * left), round((height - size[1]) * top)
    across, down = picture.width / width, picture.height / height
    exact = (
        x * across,
        y * down,
        min((x + size[0]) * across, picture.width),
        min((y + size[1]) * down, picture.height),
    )
    if width * height > _STRIP * size[0] * size[1]:  # of a strip the cut alone is scaled; it may differ by a level
        cut = picture.resize(size, Image.Resampling.BILINEAR, box=exact)
    else:
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        cut = resized.crop((x, y, x + size[0], y + size[1]))
    box = (round(exact[0]), round(exact[1]), round(exact[2]), round(exact[3]))
    return ImageCrop(cut, (y, x), box)


def crop_to_area(picture: Image.Image, area: float, left: float, top: float) -> Image.Image:
    """A rectangle of the picture's own shape with a share `area` of its pixels; `left` and `top` as above."""
    width, height = (max(1, round(side * area**0.5)) for side in picture.size)
    x, y = round((picture.width - width) * left), round((picture.height - height) * top)
    return picture.crop((x, y, x + width, y + height))


def to_pil_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] -> RGB pictures."""
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in values]
