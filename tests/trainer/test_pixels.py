"""Every kind of image file shows what its 8-bit RGB version shows, or is refused with a sentence."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipadapter_trainer.data.images import READS_AVIF, open_rgb, resize_and_crop, to_rgb, why_unreadable

from .tiny_data import encoded_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def grey() -> Image.Image:
    return Image.fromarray(GREY)


def with_alpha(mode: str) -> Image.Image:
    alpha = Image.fromarray(np.where(GREY < 128, 0, 255).astype(np.uint8))
    image = grey() if mode == "LA" else COLOURS.copy()
    image.putalpha(alpha)
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return open_rgb(io.BytesIO(data.getvalue()))[0]


def as_array(values: np.ndarray, kind: str) -> Image.Image:
    return saved(Image.fromarray(values), kind)


DEPTHS: list[tuple[str, Callable[[], Image.Image]]] = [
    ("float TIFF, 0 to 1", lambda: as_array(GREY.astype(np.float32) / 255, "tiff")),
    ("float TIFF, 0 to 255", lambda: as_array(GREY.astype(np.float32), "tiff")),
    ("float TIFF, 0 to 65535", lambda: as_array(GREY.astype(np.float32) * 257, "tiff")),
    ("int32 TIFF, 8 bits in it", lambda: as_array(GREY.astype(np.int32), "tiff")),
    ("int32 TIFF, 16 bits in it", lambda: as_array(GREY.astype(np.int32) * 257, "tiff")),
    ("int32 TIFF", lambda: as_array((GREY * (2.0**31 - 1) / 255).astype(np.int32), "tiff")),
    ("16-bit PNG", lambda: as_array(GREY.astype(np.uint16) * 257, "png")),
    ("16-bit TIFF", lambda: as_array(GREY.astype(np.uint16) * 257, "tiff")),
    ("16-bit PNG with 8 bits in it", lambda: as_array(GREY.astype(np.uint16), "png")),
    ("16-bit PNG with 12 bits in it", lambda: as_array((GREY * 4095.0 / 255).round().astype(np.uint16), "png")),
    ("8-bit PNG", lambda: saved(grey(), "png")),
    ("palette", lambda: saved(grey().convert("P"), "png")),
]


@pytest.mark.parametrize("make", [make for _, make in DEPTHS], ids=[name for name, _ in DEPTHS])
def test_grey_of_any_depth_is_its_8_bit_version(make: Callable[[], Image.Image]) -> None:
    image = make()
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), np.array(grey().convert("RGB")))


@pytest.mark.parametrize("high", [0.2, 1.0, 1.0005])
def test_a_dark_float_image_stays_as_dark(high: float) -> None:
    image = to_rgb(Image.fromarray(np.array([[0, high]], dtype=np.float32)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (round(min(high, 1) * 255),) * 3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            np.array([[0, 1.3]], dtype=np.float32),
            "its values range from 0 to 1.3, which is no known depth. Scale them to 0...1",
        ),
        (np.array([[-1, 1]], dtype=np.float32), "from -1 to 1, which is no known depth"),
        (np.array([[0, np.nan]], dtype=np.float32), "from nan to nan, which is no known depth"),
        (np.array([[0, np.inf]], dtype=np.float32), "from 0 to inf, which is no known depth"),
        (np.array([[0, 4e9]], dtype=np.float32), "from 0 to 4e+09, which is no known depth"),
        (np.array([[-3, 200]], dtype=np.int32), "from -3 to 200, which is no known depth"),
        (np.array([[0, 100_000]], dtype=np.int32), "from 0 to 100000, which is no known depth"),
    ],
)
def test_an_unknown_range_is_named(values: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        as_array(values, "tiff")


def test_transparency_is_over_white_in_every_mode() -> None:
    over_white = np.where(GREY < 128, 255, GREY)
    coloured = np.array(COLOURS)
    coloured[GREY < 128] = 255
    assert np.array_equal(np.array(saved(with_alpha("LA"), "png"))[..., 0], over_white)
    assert np.array_equal(np.array(saved(with_alpha("RGBA"), "png")), coloured)
    palette = saved(grey().convert("P"), "png", transparency=bytes(0 if i < 128 else 255 for i in range(256)))
    assert np.array_equal(np.array(palette)[..., 0], over_white)
    one = np.where(GREY == 200, 255, GREY)
    assert np.array_equal(np.array(saved(grey(), "png", transparency=200))[..., 0], one)
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(np.array(saved(sixteen, "png", transparency=200 * 257))[..., 0], one)


def test_other_colour_models_are_right() -> None:
    original = np.array(COLOURS, dtype=int)
    assert np.array_equal(np.array(saved(COLOURS.convert("CMYK"), "tiff")), original)
    plain = Image.new("RGB", (16, 16), (200, 40, 90))
    jpeg = np.array(saved(plain.convert("CMYK"), "jpeg", quality=100), dtype=int)
    assert np.abs(jpeg - np.array(plain, dtype=int)).max() <= 3  # inverted, as Adobe's are, it would be (55, 215, 165)
    assert np.abs(np.array(saved(COLOURS.convert("YCbCr"), "tiff"), dtype=int) - original).max() <= 3
    bilevel = grey().convert("1")
    assert np.array_equal(np.array(saved(bilevel, "png")), np.array(bilevel.convert("L").convert("RGB")))


@pytest.mark.parametrize(
    "kind",
    ["gif", "webp", "png", "tiff", pytest.param("avif", marks=pytest.mark.skipif(not READS_AVIF, reason="no AVIF"))],
)
def test_of_a_moving_image_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    image = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = (int(value) for value in np.array(image).reshape(-1, 3).mean(axis=0))
    assert red > 245 and green < 10 and blue < 10


# --- Sizes


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason(data: bytes | Path | Image.Image) -> str:
    with pytest.raises(Exception) as error:  # of every kind
        open_rgb(io.BytesIO(data) if isinstance(data, bytes) else data)
    assert isinstance(error.value, Exception)
    return why_unreadable(error.value)


def test_a_image_without_pixels_is_named() -> None:
    assert reason(Image.new("RGB", (0, 5))) == "an image of 0x5 pixels is empty."
    assert reason(png_header(0, 5)) == "cannot be read as JPEG, PNG, WebP or the like. Download or make it again."


def test_a_decompression_bomb_is_named_before_it_is_decoded() -> None:
    started = time.perf_counter()
    assert reason(png_header(20_000, 20_000)) == "more than 178,956,970 pixels. Scale it down."
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("size", [(8192, 4), (4, 8192), (8192, 1)])
def test_a_strip_is_cut_before_it_is_scaled(size: tuple[int, int]) -> None:
    """Scaled first it would be 1,048,576 x 512 pixels: 10 seconds and 2 GB."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    started = time.perf_counter()
    cut = resize_and_crop(strip, (512, 512)).image
    assert time.perf_counter() - started < 1
    assert cut.size == (512, 512)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 1.0])
def test_the_cut_of_a_strip_is_that_of_the_scaled_strip(place: float) -> None:
    for size in ((900, 20), (20, 900)):
        pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        strip, scale = Image.fromarray(pixels), 64 / 20
        whole = strip.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BILINEAR)
        x, y = round((whole.width - 64) * place), round((whole.height - 64) * place)
        expected = np.array(whole.crop((x, y, x + 64, y + 64)), dtype=int)
        cut = resize_and_crop(strip, (64, 64), place, place)
        assert cut.top_left == (y, x)
        assert np.abs(np.array(cut.image, dtype=int) - expected).max() <= 1


# --- Damage

WHOLE = {kind: encoded_image(COLOURS.resize((200, 200)), kind) for kind in ("png", "jpeg", "webp", "gif")}
ALIEN = {
    b"": "an empty file (0 bytes); expected JPEG, PNG, WebP or the like. Download or make it again.",
    bytes(4000): "a file of zero bytes; expected JPEG, PNG, WebP or the like.",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n": "a Git LFS pointer, not the file itself;",
    b"<!DOCTYPE html><html>404</html>": "a web page, not the file itself; expected",
    b"\0\0\0\x18ftypheic\0\0\0\0": "a HEIC image; expected JPEG, PNG, WebP or the like. Convert it to JPEG or PNG.",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing; expected JPEG, PNG, WebP or the like. Convert it",
    b"just words": "a text file that begins with 'just words'; expected JPEG",
}


@pytest.mark.parametrize("data", ALIEN, ids=list(ALIEN.values()))
def test_another_file_is_named_as_what_it_is(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    for given in (data, tmp_path / "a.png"):
        assert reason(given).startswith(ALIEN[data])


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("damage", ["cut off", "zeros at the end"])
def test_half_a_image_is_refused(kind: str, damage: str) -> None:
    """Never half grey or half black: Pillow's decoders accept a PNG or a WebP file that ends in zeros."""
    whole = WHOLE[kind]
    half = whole[: len(whole) // 2]
    text = reason(half if damage == "cut off" else half + bytes(len(whole) - len(half)))
    assert "\n" not in text
    if kind in ("webp", "png") and damage == "zeros at the end":
        assert text == "ends in zeros, so its download is incomplete. Download it again."
