"""Image files -> RGB images, cuts of a given size, and tensors."""

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
_STRIP = 8  # an image that covers its target with more than so many times its pixels

# Pillow warns at half of what it refuses; large photographs are fine.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used. The text does not name it: who opened it knows its name."""


class ImageCrop(NamedTuple):
    """A rectangle of an image, scaled to a given size."""

    image: Image.Image
    top_left: tuple[int, int]  # of the rectangle, in pixels of the whole image at the same scale
    box: tuple[int, int, int, int]  # the same rectangle in the image's own pixels: left, top, right, bottom


def open_rgb(image: ImageSource, at_least: int | None = None) -> tuple[Image.Image, Size]:
    """The image as `to_rgb` makes it, and the size of the file's image when upright.

    With `at_least`, a JPEG may come at a half, a quarter or an eighth of its size, as long as its short side keeps
    that many pixels: its decoder does this several times faster than all pixels.

    Raises whatever Pillow's decoders raise, which is nearly anything, for a damaged file.
    """
    if isinstance(image, Image.Image):
        rgb = to_rgb(image)
        return rgb, rgb.size
    with open_lazily(image) as opened:
        size = upright_size(opened)
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        if opened.format in _UNCHECKED and not _edge(image, io.SEEK_END)[-_ZERO_TAIL:].strip(b"\0"):
            raise ImageError("ends in zeros, so its download is incomplete. Download it again.")
        return to_rgb(opened), size


def open_lazily(image: Path | PackedFile | IO[bytes]) -> Image.Image:
    """The image with nothing decoded but its header. Raises what Pillow raises, ImageError for a file that is
    known to be something else.
    """
    try:
        return Image.open(image.open() if isinstance(image, PackedFile) else image)
    except (FileNotFoundError, PermissionError, IsADirectoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # also of a decoder that took another file for an image of its format
        start = _edge(image, io.SEEK_SET)
        unidentified, found = isinstance(error, UnidentifiedImageError), type_of(start)
        if found is not None and (unidentified or found not in IMAGES):
            raise ImageError(fault(start, "JPEG, PNG, WebP or the like", IMAGES)) from error
        if unidentified:  # Pillow's text names the object in memory, another one in each run
            raise UnidentifiedImageError(f"cannot identify image file '{image}'") from error
        raise


def _edge(image: Path | PackedFile | IO[bytes], whence: int) -> bytes:
    """The first bytes of a file, or the last ones."""
    if isinstance(image, Path | PackedFile):
        with image.open("rb") if isinstance(image, Path) else image.open() as stream:
            return _edge(stream, whence)
    if whence == io.SEEK_END:
        image.seek(max(0, image.seek(0, io.SEEK_END) - START))
    else:
        image.seek(0)
    return image.read(START)


def why_unreadable(error: Exception) -> str:
    """What a decoder's error says, in a line."""
    if isinstance(error, UnidentifiedImageError):  # its text names the object in memory
        return "not an image, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * cast('int', Image.MAX_IMAGE_PIXELS):,} pixels. Scale it down."
    if isinstance(error, DataError | ImageError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def upright_size(image: Image.Image) -> Size:
    """Width and height after EXIF's rotation, without decoding a pixel."""
    # A PNG may hold its EXIF data behind the pixels; to ask for them would decode all.
    rotated = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    return (image.height, image.width) if rotated else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, in RGB, transparency over white (dropping it would uncover whatever colour lies beneath).

    Raises ImageError for an image without pixels, and for values whose range is unknown.
    """
    if 0 in image.size:
        raise ImageError(f"an image of {image.width}x{image.height} pixels holds nothing.")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut off at 255: integers take the smallest depth that holds their
    values, as 12 bits may be stored in 16; floats reach to 1, or to an integer's white.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    whites = (1.001, *_DEPTHS) if image.mode == "F" else _DEPTHS
    white = next((white for white in whites if high <= white), None)  # none for NaN, which no number is compared to
    # Sixteen times less than white is black: rather refused than taken for a dark image.
    dark = (image.mode == "F" and white == _DEPTHS[0]) or white == _DEPTHS[-1]
    if white is None or low < 0 or (dark and high * 16 < white):
        raise ImageError(
            f"its values reach from {low:g} to {high:g}, an unknown range. Scale them to 0...1 or 0...255."
        )
    white = 1.0 if white < 2 else white
    grey = np.minimum(values * (255.0 / white) + 0.5, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def resize_and_crop(image: Image.Image, size: Size, left: float = 0.5, top: float = 0.5) -> ImageCrop:
    """Scale the image (bilinear, as the original does) so that it just covers `size`, and cut off the rest.

    `left` and `top` are the shares of the rest that lie before the cut: 0.5 cuts the centre.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (max(side, int(full * scale)) for side, full in zip(size, image.size, strict=True))
    x, y = round((width - size[0]) * left), round((height - size[1]) * top)
    across, down = image.width / width, image.height / height
    exact = (
        x * across,
        y * down,
        min((x + size[0]) * across, image.width),
        min((y + size[1]) * down, image.height),
    )
    if width * height > _STRIP * size[0] * size[1]:  # of a strip the cut alone is scaled; it may differ by a level
        cut = image.resize(size, Image.Resampling.BILINEAR, box=exact)
    else:
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        cut = resized.crop((x, y, x + size[0], y + size[1]))
    box = (round(exact[0]), round(exact[1]), round(exact[2]), round(exact[3]))
    return ImageCrop(cut, (y, x), box)


def crop_to_area(image: Image.Image, area: float, left: float, top: float) -> Image.Image:
    """A rectangle of the image's own shape with a share `area` of its pixels; `left` and `top` as above."""
    width, height = (max(1, round(side * area**0.5)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


def to_pil_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] -> RGB images."""
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in values]
