"""Picture files -> RGB pictures, cuts of a given size, and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .packed import PackedFile

Size = tuple[int, int]  # width, height
Stored = Image.Image | Path | PackedFile  # in memory, a file, or a file in a shard
Picture = Stored | IO[bytes]  # or an open file

_ON_ITS_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation


class Cut(NamedTuple):
    """A rectangle of a picture, scaled to a given size."""

    picture: Image.Image
    top_left: tuple[int, int]  # of the rectangle, in pixels of the whole picture at the same scale
    box: tuple[int, int, int, int]  # the same rectangle in the picture's own pixels: left, top, right, bottom


def open_rgb(picture: Picture, at_least: int | None = None) -> tuple[Image.Image, Size]:
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
        return to_rgb(opened), size


def open_lazily(picture: Path | PackedFile | IO[bytes]) -> Image.Image:
    """The picture with nothing decoded but its header. Raises what Pillow raises."""
    if not isinstance(picture, PackedFile):
        return Image.open(picture)
    try:
        return Image.open(picture.open())
    except UnidentifiedImageError as error:  # it names the object in memory, another one in each run
        raise UnidentifiedImageError(f"cannot identify image file '{picture}'") from error


def why_broken(error: Exception) -> str:
    """What a decoder's error says, in a line."""
    if isinstance(error, UnidentifiedImageError):  # its text names the object in memory
        return "not a picture, or of an unknown format"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def upright_size(picture: Image.Image) -> Size:
    """Width and height after EXIF's rotation, without decoding a pixel."""
    # A PNG may hold its EXIF data behind the pixels; to ask for them would decode all.
    rotated = "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    return (picture.height, picture.width) if rotated else picture.size


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright, in RGB, transparency over white (dropping it would uncover whatever colour lies beneath)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def cover_and_crop(picture: Image.Image, size: Size, left: float = 0.5, top: float = 0.5) -> Cut:
    """Scale the picture (bilinear, as the original does) so that it just covers `size`, and cut off the rest.

    `left` and `top` are the shares of the rest that lie before the cut: 0.5 cuts the centre.
    """
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(side, int(full * scale)) for side, full in zip(size, picture.size, strict=True))
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    x, y = round((width - size[0]) * left), round((height - size[1]) * top)
    across, down = picture.width / width, picture.height / height
    box = (round(x * across), round(y * down), round((x + size[0]) * across), round((y + size[1]) * down))
    return Cut(resized.crop((x, y, x + size[0], y + size[1])), (y, x), box)


def share_of(picture: Image.Image, area: float, left: float, top: float) -> Image.Image:
    """A rectangle of the picture's own shape with a share `area` of its pixels; `left` and `top` as above."""
    width, height = (max(1, round(side * area**0.5)) for side in picture.size)
    x, y = round((picture.width - width) * left), round((picture.height - height) * top)
    return picture.crop((x, y, x + width, y + height))
