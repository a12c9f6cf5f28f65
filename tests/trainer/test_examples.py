from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ipadapter_trainer.data.examples import Example, find_examples, fingerprint
from ipadapter_trainer.errors import DataError


def texts(examples: list[Example]) -> list[str]:
    return [example.text for example in examples]


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return file


def test_a_folder_with_captions_beside(images: Path) -> None:
    assert texts(find_examples(images))[:2] == ["a blue square", "a green square"]


def test_a_folder_with_metadata(images: Path) -> None:
    write_rows(
        images / "metadata.jsonl",
        {"file_name": "red.png", "text": "one"},
        {"file_name": "blue.png", "text": "two", "reference": "red.png", "width": 80, "height": 64},
        {"file_name": "teal.png", "text": "three", "reference": ["red.png", "blue.png"]},
    )
    one, two, three = find_examples(images)
    assert (one.text, one.references, one.size) == ("one", (), None)
    assert (two.text, two.references, two.size) == ("two", (images / "red.png",), (80, 64))
    assert three.references == (images / "red.png", images / "blue.png")


def test_a_line_separator_in_a_caption_ends_no_row(images: Path) -> None:
    """json.dumps(ensure_ascii=False) writes U+2028 as it is."""
    write_rows(images / "metadata.jsonl", {"file_name": "red.png", "text": "one\u2028two"})
    assert texts(find_examples(images)) == ["one\u2028two"]


def test_the_originals_json_list(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"image_file": "red.png", "text": "one"}]))
    assert texts(find_examples(file, images)) == ["one"]
    with pytest.raises(DataError, match=r"none of its 1 images exists.*data_root"):
        find_examples(file)


def test_face_files_are_beside_the_images_or_as_the_original_opens_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (images / "beside.npy", tmp_path / "elsewhere.bin"):
        place.write_bytes(b"")
    rows = [
        {"image_file": "red.png", "text": "", "id_embed_file": name}
        for name in ("beside.npy", "elsewhere.bin", str(tmp_path / "elsewhere.bin"), "absent.npy")
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    found = [example.face_id_embed for example in find_examples(file, images)]
    assert found == [images / "beside.npy", Path("elsewhere.bin"), tmp_path / "elsewhere.bin"]


def test_partial_data_is_reported(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "red.txt").unlink()
    assert len(find_examples(images)) == 5
    assert "1 of 6 images have no caption" in caplog.text


def test_captions_may_be_optional(images: Path) -> None:
    (images / "orange.txt").unlink()
    found = find_examples(images, require_caption=False)
    assert [example.text for example in found[:4]] == ["a blue square", "a green square", "", "a purple square"]
    assert found[2].image == images / "orange.png"


def test_rows_with_missing_files_are_reported(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(
        images / "metadata.jsonl",
        {"file_name": "red.png", "text": "one"},
        {"file_name": "red.png", "text": "two", "reference": ["blue.png", "absent.png"]},
        {"file_name": "gone.png", "text": "three"},
    )
    assert texts(find_examples(images)) == ["one"]
    assert "2 of 3 rows name a file that does not exist" in caplog.text
    assert "absent.png" in caplog.text and "line 2" in caplog.text


def test_misspelt_keys_are_named(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"weight": 1, "tags": [], "source": "web", "image_file": "a.png", "label": "a"}
    write_rows(
        images / "metadata.jsonl",
        {"file_name": "red.png", "text": "one", "Reference": "blue.png", "id_embed_files": "a.npy"},
        {"file_name": "blue.png", "text": "two", "Reference": "red.png", **others},
        {"file_name": "teal.png", "text": "three", "reference": "red.png", "referense": "blue.png"},
    )
    find_examples(images)
    assert (
        "The key 'Reference' is ignored (rows: 2). Did you mean 'reference'? "
        "The key 'id_embed_files' is ignored (rows: 1). Did you mean 'id_embed_file'? "
        "The key 'referense' is ignored (rows: 1). Did you mean 'reference'? "
        "Not in metadata.jsonl"
    ) in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{}", "expected a list"),
        ("a.json", "[", "not valid JSON"),
        ("a.json", '[{"file": "x"}]', "'image_file' must be text, found None .keys: file"),
        ("a.json", "[3]", "entry 1: expected an object"),
        ("a.json", '[{"image_file": "x", "text": "y", "reference": [1]}]', "'reference' must be a file name"),
        ("a.json", '[{"image_file": "x", "text": "y", "id_embed_file": 1}]', "'id_embed_file' must be text"),
        ("a.jsonl", '{"file_name": "x", "text": "y"}\n{', "line 2: not valid JSON"),
        ("a.jsonl", "", "it is empty"),
        ("a.csv", "", "it is empty"),
        ("a.zip", "", "expected a folder"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        find_examples(tmp_path / name)


def test_a_folder_without_captions_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_examples(tmp_path / "absent")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="found 1 images and 0 captions"):
        find_examples(tmp_path)


def test_the_fingerprint_depends_on_captions_but_not_on_the_folder(images: Path, tmp_path: Path) -> None:
    before = fingerprint(find_examples(images), images)
    moved = images.rename(tmp_path / "moved")
    assert fingerprint(find_examples(moved), moved) == before
    (moved / "red.txt").write_text("another")
    assert fingerprint(find_examples(moved), moved) != before


def test_the_fingerprint_depends_on_references_and_faces() -> None:
    image, other = Path("a.png"), Path("b.png")
    variants = [
        [Example(image, "a")],
        [Example(image, "a", (other,))],
        [Example(image, "a", (other, other))],
        [Example(image, "a", (), other)],
        [Example(image, "a"), Example(other, "")],
    ]
    assert len({fingerprint(examples) for examples in variants}) == len(variants)
