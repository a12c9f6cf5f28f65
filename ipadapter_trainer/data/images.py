"""Image files -> RGB images, crops of a given size, and tensors."""

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

from ..errors import DataError, TrainerError
from .files import IMAGES, TarMember, fault

Size = tuple[int, int]  # width, height
StoredImage = Image.Image | Path | TarMember
ImageSource = StoredImage | IO[bytes]

# Pillow reads AVIF since 11.3, if it was built with libavif.
READS_AVIF = "avif" in features.modules and bool(features.check_module("avif"))
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *((".avif",) if READS_AVIF else ()),
)

_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_WHITES = (255, 4095, 65535, 2**31 - 1)  # of 8, 12, 16 and 31 bits
_UNCHECKED = ("PNG", "WEBP", "AVIF")  # their decoders raise nothing for a file that ends in zeros
_ZERO_TAIL = 64  # bytes
_STRIP = 8  # an image that has this many times the target's pixels once it covers the target

# Pillow warns at half of what it refuses; large photographs are fine.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def check_image_file(path: Path) -> None:
    """Raises TrainerError for a path that no image can be written to: a folder, or an unknown suffix."""
    if path.is_dir():
        raise TrainerError(f"{path}: this is a folder. Give a file name, such as {path / 'image.png'}.")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise TrainerError(f"{path}: unknown image suffix {path.suffix!r}. Use .png.")


class ImageError(ValueError):
    """An image that cannot be used. The text does not name the file; the caller does."""


class ImageCrop(NamedTuple):
    """A rectangle of an image, scaled to a given size."""

    image: Image.Image
    top_left: tuple[int, int]  # of the rectangle, in pixels of the whole scaled image
    box: tuple[int, int, int, int]  # the rectangle in pixels of the original image: left, top, right, bottom


def open_rgb(image: ImageSource, at_least: int | None = None) -> tuple[Image.Image, Size]:
    """The image as by `to_rgb`, and the upright size of the image in the file.

    With `at_least`, a JPEG may be decoded at a half, a quarter or an eighth of its size, several times faster, as long
    as its short side keeps that many pixels.

    Raises whatever Pillow's decoders raise, which is nearly anything, for a damaged file.
    """
    if isinstance(image, Image.Image):
        rgb = to_rgb(image)
        return rgb, rgb.size
    with open_lazily(image) as opened:
        size = upright_size(opened)
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        if opened.format in _UNCHECKED and not _read_end(image, io.SEEK_END)[-_ZERO_TAIL:].strip(b"\0"):
            raise ImageError("ends in zeros, so its download is incomplete. Download it again.")
        return to_rgb(opened), size


def open_lazily(image: Path | TarMember | IO[bytes]) -> Image.Image:
    """The image with only its header read. Raises what Pillow raises; ImageError for a file of another known type."""
    try:
        return Image.open(image.open() if isinstance(image, TarMember) else image)
    except (FileNotFoundError, PermissionError, IsADirectoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # a decoder may also have taken another file for an image of its format
        start = _read_end(image, io.SEEK_SET)
        unidentified, found = isinstance(error, UnidentifiedImageError), type_of(start)
        if found is not None and (unidentified or found not in IMAGES):
            raise ImageError(fault(start, "JPEG, PNG, WebP or the like", IMAGES)) from error
        if unidentified:  # Pillow's text holds an object's address, different in each run
            raise UnidentifiedImageError(f"cannot identify image file '{image}'") from error
        raise


def _read_end(image: Path | TarMember | IO[bytes], whence: int) -> bytes:
    """The first bytes of a file, or the last ones."""
    if isinstance(image, Path | TarMember):
        with image.open("rb") as stream:
            return _read_end(stream, whence)
    image.seek(max(0, image.seek(0, io.SEEK_END) - START) if whence == io.SEEK_END else 0)
    return image.read(START)


def file_size(image: StoredImage) -> int:
    """Bytes of the file; 0 for an image in memory. Raises OSError."""
    if isinstance(image, TarMember):
        return image.size
    return image.stat().st_size if isinstance(image, Path) else 0


def is_readable(image: ImageSource) -> bool:
    """Whether an image can be opened and decoded."""
    try:
        open_rgb(image)
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return False
    return True


def why_unreadable(error: Exception) -> str:
    """A decoder's error in one line."""
    if isinstance(error, UnidentifiedImageError):  # its text holds an object's address
        return "not an image, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * cast('int', Image.MAX_IMAGE_PIXELS):,} pixels. Scale it down."
    if isinstance(error, DataError | ImageError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def upright_size(image: Image.Image) -> Size:
    """Width and height after EXIF's rotation, without decoding pixels."""
    # A PNG may hold its EXIF data after the pixels; getexif would decode them.
    rotated = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in _ROTATED
    return (image.height, image.width) if rotated else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, in RGB, transparency over white (dropping alpha would show arbitrary colours).

    Raises ImageError for an image without pixels, and for values with an unknown range.
    """
    if 0 in image.size:
        raise ImageError(f"an image of {image.width}x{image.height} pixels is empty.")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would clip at 255. Integers have the smallest depth that holds their
    values, as 12 bits may be stored in 16; floats have a white of 1, or that of an integer depth.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    whites = (1.001, *_WHITES) if image.mode == "F" else _WHITES
    white = next((white for white in whites if high <= white), None)  # None for NaN
    # Values that reach a sixteenth of white at most: refused, as they may have another range.
    dark = (image.mode == "F" and white == _WHITES[0]) or white == _WHITES[-1]
    if white is None or low < 0 or (dark and high * 16 < white):
        raise ImageError(
            f"its values range from {low:g} to {high:g}, which is no known depth. Scale them to 0...1 or 0...255."
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
    """Scale the image (bilinear, as the original does) so that it just covers `size`, and crop it.

    `left` and `top` are the fractions of the removed pixels that are left of and above the crop: 0.5 is the centre.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (max(side, int(full * scale)) for side, full in zip(size, image.size, strict=True))
    x, y = round((width - size[0]) * left), round((height - size[1]) * top)
    x_scale, y_scale = image.width / width, image.height / height
    exact = (
        x * x_scale,
        y * y_scale,
        min((x + size[0]) * x_scale, image.width),
        min((y + size[1]) * y_scale, image.height),
    )
    if width * height > _STRIP * size[0] * size[1]:  # only the crop is scaled; it may differ by one level
        cropped = image.resize(size, Image.Resampling.BILINEAR, box=exact)
    else:
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        cropped = resized.crop((x, y, x + size[0], y + size[1]))
    box = (round(exact[0]), round(exact[1]), round(exact[2]), round(exact[3]))
    return ImageCrop(cropped, (y, x), box)


def crop_to_area(image: Image.Image, area: float, left: float, top: float) -> Image.Image:
    """A rectangle of the image's aspect ratio with a fraction `area` of its pixels; `left` and `top` as above."""
    width, height = (max(1, round(side * area**0.5)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


def to_pil_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] -> RGB images."""
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in values]
