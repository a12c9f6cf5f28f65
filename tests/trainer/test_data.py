from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from ipadapter_trainer.base_model import BaseModel
from ipadapter_trainer.config import TrainConfig, make_config
from ipadapter_trainer.data import PictureDataset, Recipe, ShuffledDraws, loader, resize_and_crop, to_rgb
from ipadapter_trainer.errors import DataError
from ipadapter_trainer.examples import Example, find_examples, fingerprint
from PIL import Image


def texts(examples: list[Example]) -> list[str]:
    return [example.text for example in examples]


def red(size: tuple[int, int] = (80, 64)) -> Image.Image:
    return Image.new("RGB", size, "red")


def test_a_folder_with_captions_beside(pictures: Path) -> None:
    assert texts(find_examples(pictures))[:2] == ["a blue square", "a green square"]


def test_a_folder_with_metadata(pictures: Path) -> None:
    rows = [
        {"file_name": "red.png", "text": "one"},
        {"file_name": "blue.png", "text": "two", "reference": "red.png"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    examples = find_examples(pictures)
    assert texts(examples) == ["one", "two"]
    assert examples[1].reference == pictures / "red.png"


def test_the_originals_json_list(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"image_file": "red.png", "text": "one"}]))
    assert texts(find_examples(file, pictures)) == ["one"]
    with pytest.raises(DataError, match=r"none of its 1 pictures exists.*data_root"):
        find_examples(file)


def test_partial_data_is_reported(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "red.txt").unlink()
    assert len(find_examples(pictures)) == 5
    assert "1 of 6 pictures have no caption" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{}", "expected a list"),
        ("a.json", "[", "not valid JSON"),
        ("a.json", '[{"file": "x"}]', "'image_file' must be text, found None .keys: file"),
        ("a.json", "[3]", "entry 1: expected an object"),
        ("a.jsonl", '{"file_name": "x", "text": "y"}\n{', "line 2: not valid JSON"),
        ("a.jsonl", "", "it is empty"),
        ("a.csv", "", "expected a folder"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        find_examples(tmp_path / name)


def test_a_folder_without_captions_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_examples(tmp_path / "absent")
    red().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="found 1 pictures and 0 captions"):
        find_examples(tmp_path)


def test_the_fingerprint_knows_captions_but_not_the_place(pictures: Path, tmp_path: Path) -> None:
    before = fingerprint(find_examples(pictures), pictures)
    moved = pictures.rename(tmp_path / "moved")
    assert fingerprint(find_examples(moved), moved) == before
    (moved / "red.txt").write_text("another")
    assert fingerprint(find_examples(moved), moved) != before


def test_an_item_has_the_originals_names_and_ranges(base_model: BaseModel) -> None:
    reference = Image.new("RGB", (40, 90), "blue")
    dataset = PictureDataset([Example(red(), "a red square", reference)], base_model, Recipe(64, text_dropout=0))
    item = dataset[0]
    assert item["images"].shape == (3, 64, 64)
    assert item["images"][:, 0, 0].tolist() == [1, -1, -1]
    assert item["clip_images"].shape == (3, 32, 32)
    expected = base_model.image_processor(images=reference, return_tensors="pt").pixel_values[0]
    assert torch.equal(item["clip_images"], expected)
    assert item["text_input_ids"].shape == (16,)
    assert item["drop_image_embeds"] in (0, 1)


def test_resize_takes_the_short_side_and_the_centre() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("red", (100, 0, 200, 100))
    assert resize_and_crop(picture, 50).getcolors() is not None
    assert resize_and_crop(picture, 50).getpixel((25, 25)) == (255, 0, 0)
    assert resize_and_crop(Image.new("RGB", (7, 1000)), 64).size == (64, 64)


def test_transparency_becomes_white() -> None:
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_dropout_shares(base_model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipadapter_trainer.data.to_tensor", lambda picture: torch.zeros(1))
    dataset = PictureDataset([Example(red((8, 8)), "red")], base_model, Recipe(8, seed=3))
    dataset._processor = lambda **_: type("Output", (), {"pixel_values": torch.zeros(1, 1)})  # type: ignore[assignment]
    empty = base_model.tokenizer("", padding="max_length", max_length=16, return_tensors="pt").input_ids[0]
    seen: Counter[tuple[bool, bool]] = Counter()
    for epoch in range(3000):
        item = dataset[epoch, 0]
        seen[bool(item["drop_image_embeds"]), torch.equal(item["text_input_ids"], empty)] += 1
    for dropped in ((True, False), (False, True), (True, True)):
        assert 0.035 < seen[dropped] / 3000 < 0.065


def test_draws_are_a_permutation_per_epoch_and_start_anywhere() -> None:
    draws = list(islice(ShuffledDraws(7, seed=1), 21))
    for epoch in range(3):
        assert sorted(d.row for d in draws[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert [d.row for d in draws[:7]] != [d.row for d in draws[7:14]]
    for start in (0, 3, 7, 12):
        assert list(islice(ShuffledDraws(7, 1, start), 21 - start)) == draws[start:]


def test_workers_do_not_change_the_batches(base_model: BaseModel, config: TrainConfig) -> None:
    dataset = PictureDataset(find_examples(config.data), base_model, Recipe(64, seed=0, flip=True))
    alone = list(islice(loader(dataset, config), 4))
    with_workers = config.model_copy(update={"workers": 2})
    helped = list(islice(loader(dataset, with_workers), 4))
    late = list(islice(loader(dataset, config, start=4), 2))
    for a, b in [*zip(alone, helped, strict=True), *zip(alone[2:], late, strict=True)]:
        for name in ("images", "clip_images", "text_input_ids", "drop_image_embeds"):
            assert torch.equal(a[name], b[name])


def test_a_broken_picture_is_replaced_and_named(base_model: BaseModel, pictures: Path) -> None:
    data = (pictures / "red.png").read_bytes()
    (pictures / "red.png").write_bytes(data[: len(data) // 2])
    (pictures / "blue.png").write_text("not a picture")
    dataset = PictureDataset(find_examples(pictures), base_model, Recipe(64))
    items = [dataset[i] for i in range(6)]
    assert sum(bool(item["broken"]) for item in items) == 2
    assert any("red.png" in line for item in items for line in item["broken"])
    assert all(item["images"].shape == (3, 64, 64) for item in items)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_pictures_is_one_clear_error(
    pictures: Path, settings: dict[str, object], workers: int
) -> None:
    from ipadapter_trainer.train import train

    for file in pictures.glob("*.png"):
        file.write_text("not a picture")
    with pytest.raises(DataError) as error:
        train(make_config({**settings, "workers": workers}))
    assert str(error.value).startswith("None of the 6 pictures can be read.")
