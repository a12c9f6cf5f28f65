from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ipadapter_trainer.cli import app
from ipadapter_trainer.data.check import SAMPLES, _sample, check_data
from ipadapter_trainer.data.check_report import TOKENS, ImageInfo, approximate_tokens
from ipadapter_trainer.data.duplicates import ImageHash, duplicates, image_hash, near_duplicates
from ipadapter_trainer.errors import DataError

from .tiny_data import encoded_image, sample, write_shard


def painting(seed: int, size: tuple[int, int] = (120, 80)) -> Image.Image:
    """An image like no other."""
    blots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC)


def add(folder: Path, name: str, image: Image.Image, caption: str | None = None, **options: int) -> None:
    image.save(folder / name, **options)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Ten images, each with one fault or none."""
    folder = tmp_path / "flawed"
    folder.mkdir()
    for i in range(3):
        add(folder, f"good{i}.png", painting(i), f"a painting, number {i}")
    (folder / "copy.png").write_bytes((folder / "good0.png").read_bytes())
    (folder / "copy.txt").write_text("a copy")
    add(folder, "near.jpg", painting(1, (180, 120)), "nearly number 1", quality=60)
    add(folder, "tiny.png", painting(3, (40, 100)), "tiny")
    add(folder, "silent.png", painting(4, (80, 120)))
    add(folder, "again.png", painting(5), "a painting, number 2")
    add(folder, "long.png", painting(6), "word " * 90)
    (folder / "broken.png").write_bytes((folder / "good2.png").read_bytes()[:-2000])
    (folder / "broken.txt").write_text("broken")
    return folder


def names(found: list[str]) -> list[str]:
    return [Path(name.split(" ")[0].rstrip(":")).name for name in found]


def test_every_fault_is_found_and_nothing_else(flawed: Path) -> None:
    report = check_data(flawed, min_side=64)
    assert (report.images, report.usable) == (10, 8)
    assert names(report.broken) == ["broken.png"]
    assert names(report.without_caption) == ["silent.png"]
    assert names(report.tiny) == ["tiny.png"]
    assert names(report.long_captions) == ["long.png"]
    assert [names(group) for group in report.duplicates] == [["copy.png", "good0.png"]]
    assert report.near_duplicates is not None
    assert [names(group) for group in report.near_duplicates] == [["good1.png", "near.jpg"]]
    assert report.repeated_captions == {"a painting, number 2": 2}
    assert report.missing == []
    assert report.shapes == {"1:2": 1, "2:3": 1, "3:2": 7}
    assert report.short_side is not None
    assert (report.short_side.min, report.short_side.median, report.short_side.max) == (40, 80, 120)


def test_a_list_names_what_is_missing(images: Path) -> None:
    rows = [
        {"file_name": "red.png", "text": "one", "reference": "blue.png"},
        {"file_name": "gone.png", "text": "two"},
        {"file_name": "teal.png", "text": "three", "reference": "green.png"},
    ]
    (images / "green.png").write_text("not an image")
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check_data(images)
    assert (report.images, report.usable, report.references) == (2, 1, 2)
    assert "gone.png" in report.missing[0] and "line 2" in report.missing[0]
    assert "teal.png: a text file that begins with 'not an image'" in report.broken[0]  # its reference cannot be read


def test_shards_are_checked_too(tmp_path: Path) -> None:
    face = {"face.npy": b"?"}
    samples = {f"{n}": sample(n) for n in range(5)} | {"5": {"txt": b"a"}, "6": {**sample(6), **face}}
    whole = write_shard(tmp_path / "s0.tar", samples)
    (tmp_path / "s1.tar").write_bytes(whole.read_bytes()[:3000])
    report = check_data(f"{tmp_path}/s{{0..1}}.tar")
    assert report.usable >= 6
    assert any("s0.tar/5: no image" in line for line in report.broken)
    assert any(
        "s0.tar/6.face.npy: a text file that begins with '?'; expected a face embedding" in line
        for line in report.broken
    )
    assert "s1.tar" in report.missing[0]
    assert ["s0.tar/0.png", "s1.tar/0.png"] in report.duplicates


def test_what_is_too_large_for_a_tar_in_memory_is_not_held(tmp_path: Path) -> None:
    """Entries are taken as they are needed, so a stream of shards is never read ahead by much."""
    from concurrent.futures import ThreadPoolExecutor

    from ipadapter_trainer.data import check as data_check

    taken = 0

    def things() -> object:
        nonlocal taken
        for i in range(1000):
            taken = i
            yield i

    with ThreadPoolExecutor(1) as pool:
        results = data_check._map_in_order(pool, lambda thing: thing, things())
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert taken < 100
        assert list(results) == list(range(3, 1000))


# --- Duplicates


def test_hashes_depend_on_shape_and_colour() -> None:
    one = image_hash(painting(1))
    assert one.is_near(image_hash(painting(1, (480, 320))))
    assert not one.is_near(image_hash(painting(2)))
    red, blue = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((200, 0, 0), (10, 20, 40, 50))
    blue.paste((0, 0, 200), (10, 20, 40, 50))
    assert image_hash(red).hash == image_hash(blue).hash
    assert not image_hash(red).is_near(image_hash(blue))


def test_groups_are_chains_of_near_duplicates() -> None:
    def hash_of(bits: int, colour: int = 0) -> ImageHash:
        return ImageHash(bits, (colour,) * 3)

    # Three bits at a time lead from a to c; d has another colour, e another hash.
    hashes = [
        ("a", hash_of(0)),
        ("e", hash_of(0xFFFF)),
        ("b", hash_of(0b111)),
        ("c", hash_of(0b111 | 0b111 << 20)),
        ("d", hash_of(0, 5)),
        ("f", hash_of(0xFFFF)),
    ]
    assert near_duplicates(hashes) == [["a", "b", "c"], ["e", "f"]]
    spread = [(str(bit), hash_of(1 << bit | 1 << (bit + 21) % 64 | 1 << (bit + 42) % 64)) for bit in (0, 7, 40)]
    for name, three in spread:  # three bits in three bands: the fourth agrees
        assert near_duplicates([("zero", hash_of(0)), (name, three)]) == [["zero", name]]
    assert duplicates([("a", 1), ("b", 2), ("c", 1)]) == [["a", "c"]]


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 2), ("a red square", 5), ("a cat, a dog.", 8), ("naturwissenschaftlich", 5)]
)
def test_tokens_are_estimated(text: str, tokens: int) -> None:
    assert approximate_tokens(text) == tokens


def test_the_estimate_is_near_clips(flawed: Path) -> None:
    """Captions of ordinary words have about one token a word; the limit is the encoder's 77."""
    assert approximate_tokens("word " * 75) == TOKENS
    assert approximate_tokens("word " * 76) > TOKENS


# --- The command


def check(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_reports_and_draws(flawed: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "new" / "samples.png"
    code, out, err = check(flawed, "--min-side", "64", "--sheet", sheet)
    assert code == 0
    assert "10, of which 8 can be used" in out
    for line in ("broken            1", "same file         1", "nearly the same   1", "below 64 px       1"):
        assert line in out
    assert f"samples           {sheet}" in out
    assert "10/10" in err  # the progress bar
    with Image.open(sheet) as image:
        assert image.size == (8 + 6 * 200, 28 + 2 * 285)  # nine images that can be read
        columns = np.array(image.convert("L"))[28:220, 8:].reshape(192, -1)
        assert (columns < 200).mean() > 0.2


def test_a_sheet_has_a_bounded_number_of_samples(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(SAMPLES + 10):
        add(folder, f"{i:02}.png", painting(i, (30, 30)), "a")
    sheet = tmp_path / "sheet.png"
    check_data(folder, sheet=sheet)
    with Image.open(sheet) as image:
        assert image.height == 28 + 4 * 285
    before = sheet.read_bytes()
    sheet.unlink()
    check_data(folder, sheet=sheet)
    assert sheet.read_bytes() == before  # the same samples each time


def test_every_image_may_be_a_sample() -> None:
    chosen: dict[int, ImageInfo] = {}
    for seen in range(1000):
        _sample(chosen, ImageInfo(str(seen), "a", thumbnail=painting(0, (8, 8))), seen)
    numbers = sorted(int(info.name) for info in chosen.values())
    assert len(set(numbers)) == SAMPLES
    assert 350 < sum(numbers) / SAMPLES < 650
    assert numbers[0] < 200 and numbers[-1] > 800


def test_json_is_json(flawed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = check(flawed, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["images"], report["usable"], report["sheet"]) == (10, 8, "sheet.png")
    assert len(report["tiny"]) == 9  # below 512
    assert Path("sheet.png").is_file()


def test_a_clean_data_set_has_no_faults(tmp_path: Path) -> None:
    add(tmp_path, "a.png", painting(0), "a")
    code, out, _ = check(tmp_path, "--no-sheet", "--min-side", "1")
    assert code == 0
    assert "faults            none found" in out
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent",), "absent: no such file or folder"),
        (("pipe:cat x.tar",), "not by 'pipe'"),
        ((".", "--sheet", "a.xyz"), "unknown image suffix '.xyz'"),
        ((".", "--sheet", "."), ".: this is a folder. Give a file name, such as image.png."),
        ((".",), "none of the 1 images can be used"),
        (("",), "data is missing. Name a folder, a list or shards"),
        ((".", "--root", "images"), "--root is for .json, .jsonl and .csv lists, but data is '.'. Leave it out."),
        (("a-{0..9}.tar", "--root", "images"), "lists, but data is 'a-{0..9}.tar'. Leave it out."),
        ((".", "--sheet", "s.png", "--no-sheet"), "--sheet s.png and --no-sheet exclude each other. Leave one out."),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(encoded_image(painting(0))[:100])
    Path("a.txt").write_text("a")
    code, _, err = check(*arguments)
    assert code == 2
    assert words in err.splitlines()[-1]


def test_without_imagehash_the_rest_is_checked(flawed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "imagehash", None)
    monkeypatch.setattr(
        "ipadapter_trainer.data.duplicates.find_spec", lambda name: None if name == "imagehash" else find(name)
    )
    report = check_data(flawed, min_side=64)
    assert report.near_duplicates is None
    assert len(report.duplicates) == 1
    assert "nearly the same   not checked; pip install" in report.as_text()


def test_a_wrong_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        check_data(tmp_path / "a.json")
