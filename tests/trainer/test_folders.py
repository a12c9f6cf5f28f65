"""What a folder or a list holds that is not read: everything is named, and several faults at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ipadapter_trainer.cli import app
from ipadapter_trainer.data.examples import Example, find_examples, scan
from ipadapter_trainer.data.images import IMAGE_SUFFIXES, READS_AVIF
from ipadapter_trainer.errors import DataError

from .conftest import draw_image


def add(file: Path, caption: str | bytes | None = "a caption", suffix: str = ".txt") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_image("red").save(file, "PNG")  # decoders go by the content
    if caption is not None:
        file.with_suffix(suffix).write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return file


def names(examples: list[Example]) -> list[str]:
    return [Path(example.name).name for example in examples]


def check(folder: Path | str, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--no-sheet", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


# --- Which files are read


@pytest.mark.parametrize("name", ["a.jpe", "a.jfif", "A.JPG", "a b.png", "ä 猫.webp", "a.b.png", "#1 [x].png"])
def test_names_that_are_read(tmp_path: Path, name: str) -> None:
    file = add(tmp_path / name)
    assert [(example.image, example.text) for example in find_examples(tmp_path)] == [(file, "a caption")]


@pytest.mark.skipif(not READS_AVIF, reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    draw_image("red").save(tmp_path / "a.avif")
    (tmp_path / "a.txt").write_text("a red square")
    code, out, err = check(tmp_path)
    assert (code, "1, of which 1 can be used" in out) == (0, True), err


def test_without_avif_its_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ipadapter_trainer.data import folders

    monkeypatch.setattr(folders, "IMAGE_SUFFIXES", tuple(s for s in IMAGE_SUFFIXES if s != ".avif"))
    for name in ("a.avif", "b.AVIF"):
        (tmp_path / name).touch()
    assert scan(tmp_path).ignored == ["2 .avif files are ignored: Pillow 11.3 or newer reads it."]


def test_captions_in_capitals_belong_to_their_images(tmp_path: Path) -> None:
    add(tmp_path / "A.JPG", "one", ".TXT")
    add(tmp_path / "b.png", "two", ".Caption")
    assert [example.text for example in find_examples(tmp_path)] == ["one", "two"]


def test_equal_names_in_sub_folders_are_different_images(tmp_path: Path) -> None:
    for folder in ("one", "two", "two/three"):
        add(tmp_path / folder / "a.png", folder)
    assert [example.text for example in find_examples(tmp_path)] == ["one", "two", "two/three"]


def test_hidden_and_system_files_are_skipped_without_a_word(tmp_path: Path) -> None:
    add(tmp_path / "a.png")
    for name in (".DS_Store", "._a.png", ".hidden.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cache/huggingface"):
        add(tmp_path / folder / "copy.png")
    found = scan(tmp_path)
    assert names(found.examples) == ["a.png"]
    assert (found.ignored, found.unused, found.without_caption) == ([], [], [])


def test_links_are_followed_once(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    add(data / "sub" / "a.png", "inside")
    add(elsewhere / "b.png", "outside")
    (data / "c.png").symlink_to(elsewhere / "b.png")
    (data / "c.txt").write_text("a linked file")
    for name, target in (("up", data), ("same", data / "sub"), ("out", elsewhere), ("out again", elsewhere)):
        (data / name).symlink_to(target, target_is_directory=True)
    for name in ("gone.png", "gone too.png"):
        (data / name).symlink_to("nowhere.png")
    os.mkfifo(data / "pipe.png")
    found = scan(data)
    assert [example.text for example in found.examples] == ["a linked file", "outside", "inside"]
    assert found.ignored == [
        f"Broken links: 2, such as {data / 'gone too.png'}.",
        f"Pipes, sockets or devices: 1, such as {data / 'pipe.png'}.",
    ]


# --- Which are not


def test_every_other_file_is_counted_by_its_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path / "a.png")
    for name in ("1.heic", "2.HEIC", "3.heic", "m.mp4", "n.mp4", "x.psd", "d.json", "README", "s.tar", "f.xyz"):
        (tmp_path / name).write_bytes(b"x")
    expected = [
        "3 .heic files are ignored: convert to JPEG or PNG.",
        "2 .mp4 files are ignored: save frames of it as images.",
        "1 file without a suffix is ignored.",
        "1 .json file is ignored: to read a list, set data to the file, or name it metadata.",
        "1 .psd file is ignored: convert to JPEG or PNG.",
        "1 .tar file is ignored: to read shards, set data='FOLDER/*.tar'.",
        "1 .xyz file is ignored.",
    ]
    assert scan(tmp_path).ignored == expected
    find_examples(tmp_path)
    (line,) = caplog.messages
    assert line == f"{tmp_path}: {' '.join(expected[:5])} And 2 more: `ipadapter data check` lists all."
    code, out, _ = check(tmp_path)
    assert code == 0
    assert all(sentence in out for sentence in expected)


def test_captions_of_no_use_and_empty_ones_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path / "a.png", "one")
    (tmp_path / "a.caption").write_text("another")
    for name, caption in (("b.png", " \n"), ("c.png", "")):
        add(tmp_path / name, caption)
    for name in ("lost.txt", "lost too.txt"):
        (tmp_path / name).write_text("lost")
    assert scan(tmp_path).unused == [
        f"{tmp_path / 'a.caption'} (a.txt is read)",
        f"{tmp_path / 'lost too.txt'} (no image of this name)",
        f"{tmp_path / 'lost.txt'} (no image of this name)",
    ]
    find_examples(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: Unused caption files: 3, such as {tmp_path / 'a.caption'} (a.txt is read). "
        f"Empty captions: 2, such as that of {tmp_path / 'b.png'}."
    ]
    _, out, _ = check(tmp_path)
    assert "unused captions   3" in out and "empty captions    2" in out


# --- What cannot be read is collected


def assert_all_named(data: Path, *words: str) -> None:
    """In the training's one refusal and in the check, both with status 2."""
    with pytest.raises(DataError) as error:
        find_examples(data)
    code, out, err = check(data)
    assert code == 2
    assert err.splitlines()[-1].endswith("captions or rows are unreadable; a training refuses them.")
    for word in words:
        assert word in str(error.value) and word in out, word


def test_undecodable_captions_are_named_at_once(tmp_path: Path) -> None:
    add(tmp_path / "good.png")
    add(tmp_path / "a.png", "Käse".encode("latin-1"))
    add(tmp_path / "b.png", "a cat".encode("utf-16-le"))
    add(tmp_path / "c.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    add(tmp_path / "d.png", b"<!DOCTYPE html>\n<html>404</html>")
    assert_all_named(
        tmp_path,
        f"{tmp_path / 'a.txt'}: not UTF-8 text (byte 0xe4 at position 1). Save it as UTF-8.",
        f"{tmp_path / 'b.txt'}: holds zero bytes: damaged, or UTF-16 without a byte order mark. Save it as UTF-8.",
        f"{tmp_path / 'c.txt'}: a Git LFS pointer, not the file itself; expected a caption. Download it again; in",
        f"{tmp_path / 'd.txt'}: a web page, not the file itself; expected a caption.",
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marked_captions_are_read(tmp_path: Path, encoding: str) -> None:
    add(tmp_path / "a.png", "ein Käse, <sks>".encode(encoding))
    assert [example.text for example in find_examples(tmp_path)] == ["ein Käse, <sks>"]


def test_a_caption_may_begin_as_a_tag(tmp_path: Path) -> None:
    add(tmp_path / "a.png", "<sks> dog")
    assert [example.text for example in find_examples(tmp_path)] == ["<sks> dog"]


def test_bad_rows_are_named_at_once(images: Path) -> None:
    good = json.dumps({"file_name": "red.png", "text": "one"})
    lines = [
        good,
        "{",
        '{"file_name": "red.png"}',
        "[1]",
        good,
        '{"file_name": "red.png", "text": "x", "reference": 1}',
    ]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    assert_all_named(
        images,
        "metadata.jsonl line 2: not valid JSON",
        "line 3: 'text' must be text, found None (keys: file_name)",
        "line 4: expected an object with 'file_name' and 'text', found [1]",
        "line 6: 'reference' must be a file name or a list of them, found 1",
    )
    rows = [{"image_file": "red.png", "text": "one"}, {"image_file": "red.png"}, 3]
    (images / "list.json").write_text(json.dumps(rows))
    assert_all_named(images / "list.json", "entry 2: 'text' must be text", "entry 3: expected an object")


def test_the_rest_of_many_faults_is_counted(images: Path) -> None:
    (images / "metadata.jsonl").write_text("{\n" * 12)
    with pytest.raises(DataError, match=r"12 captions or rows are unreadable.*line 5: .*And 7 more: `ipadapter data"):
        find_examples(images)


# --- Lists


def test_a_csv_is_read_as_imagefolder_does(images: Path) -> None:
    rows = 'file_name,text,reference,width,height\nred.png,"one, ""two""",,80,64\nblue.png,"two\nlines",teal.png,,\n\n'
    (images / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    one, two = find_examples(images)
    assert (one.text, one.references, one.size) == ('one, "two"', (), (80, 64))
    assert (two.text, two.references, two.size) == ("two\nlines", (images / "teal.png",), None)
    assert len(find_examples(images / "metadata.csv")) == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "file_name;text\nred.png;a",
            "its columns are file_name;text; expected file_name and text, separated by commas",
        ),
        ("image,caption\nred.png,a", "its columns are image, caption; expected file_name and text"),
        ("file_name,text\nred.png,a cat, sitting", r'line 2: 3 values for 2 columns. Put "a caption, with commas" in'),
        ("file_name,text\nred.png", "line 2: 1 values for 2 columns"),
        (
            'file_name,text\nred.png,"a\nblue.png,b',
            "not valid CSV .unexpected end of data.; the lines after it are not",
        ),
        ("file_name,text\n", "it is empty"),
    ],
)
def test_a_bad_csv_is_named(images: Path, rows: str, words: str) -> None:
    (images / "metadata.csv").write_text(rows)
    with pytest.raises(DataError, match=words):
        find_examples(images)


def test_two_lists_in_a_folder_are_refused(images: Path) -> None:
    (images / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "one"}')
    (images / "metadata.csv").write_text("file_name,text\nred.png,two\n")
    code, _, err = check(images)
    assert code == 2
    assert f"{images} holds metadata.jsonl and metadata.csv. Keep one, or set data to one of the files." in err
    assert [example.text for example in find_examples(images / "metadata.csv")] == ["two"]


def test_what_lies_beside_a_list_is_named(images: Path) -> None:
    (images / "red.npy").touch()
    (images / "other.npy").touch()
    row = {"file_name": "red.png", "text": "one", "reference": "blue.png", "id_embed_file": "red.npy"}
    (images / "metadata.jsonl").write_text(json.dumps(row))
    assert scan(images).ignored == [
        "1 .npy file is ignored.",
        f"Not in metadata.jsonl: 4 images, such as {images / 'green.png'}.",
        "Caption files are ignored, 6 of them: captions come from metadata.jsonl.",
    ]


def test_lists_one_folder_down_are_named(images: Path) -> None:
    for folder, name in (("one", "metadata.jsonl"), ("two", "metadata.csv")):
        (images / folder).mkdir()
        (images / folder / name).touch()
    advice = "to read it, or move it to the top of the folder."
    assert scan(images).ignored == [
        f"{images}/one/metadata.jsonl is not read. Set data={images}/one {advice}",
        f"{images}/two/metadata.csv is not read. Set data={images}/two {advice}",
    ]


# --- Nothing to read


def empty(folder: Path) -> None:
    pass


def folder_of_folders(folder: Path) -> None:
    (folder / "one" / "two").mkdir(parents=True)


def shards_only(folder: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (folder / name).touch()


def heic_only(folder: Path) -> None:
    for name in ("a.heic", "b.heic"):
        (folder / name).touch()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, "{0}: an empty folder. Put images into it, each with a caption: cat.png and cat.txt."),
        (folder_of_folders, "{0}: an empty folder."),
        (shards_only, "{0}: found no images but 2 .tar files. To read shards, set data='{0}/*.tar'."),
        (
            heic_only,
            "found 0 images and 0 captions, but no image with a caption. 2 .heic files are ignored: convert",
        ),
    ],
)
def test_a_folder_of_nothing_says_what_it_holds(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path)
    code, _, err = check(tmp_path)
    assert code == 2
    assert words.format(tmp_path) in err.splitlines()[-1]
    with pytest.raises(DataError):
        find_examples(tmp_path)


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*: no such file or folder. A pattern of shards ends in .tar."):
        find_examples(tmp_path / "*")


def test_the_check_leaves_nothing_in_the_data(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(images.iterdir())
    monkeypatch.chdir(images)
    for folder in (".", images):
        result = CliRunner().invoke(app, ["data", "check", str(folder)])
        assert result.exit_code == 0, result.stderr
        assert (
            "No contact sheet: this is the data set's folder. Write it elsewhere with --sheet ../sheet.png."
            in result.stderr
        )
    result = CliRunner().invoke(app, ["data", "check", ".", "--sheet", "sub/sheet.png"])
    assert result.exit_code == 2
    assert "sub/sheet.png would become part of the data set. Choose a folder outside ." in result.stderr
    assert sorted(images.iterdir()) == before
    result = CliRunner().invoke(app, ["data", "check", ".", "--sheet", "../sheet.png"])
    assert (result.exit_code, Image.open(images.parent / "sheet.png").format) == (0, "PNG")


def test_two_of_a_fault_are_both_named(images: Path) -> None:
    for name in ("red", "blue"):
        (images / f"{name}.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for name in ("teal", "green"):
        (images / f"{name}.txt").unlink()
    code, out, _ = check(images)
    assert code == 0
    assert "broken            2" in out and "without caption   2" in out
    assert (
        out.count("a Git LFS pointer, not the file itself; expected JPEG, PNG, WebP or the like. Download it again")
        == 2
    )
