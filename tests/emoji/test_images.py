"""The emoji images: how they are built, split and read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipadapter_core.assets import PROMPTS, emoji_folder
from ipadapter_trainer.data.images import to_pil_images
from ipadapter_trainer.demo.emoji import STYLE_NAMES, TEXT_CONCEPTS, caption, load_images, to_pixels
from tools.shipped_emoji.build import STYLES, build, is_held_out, render, save_prompts, svg, twin_group

IMAGES = emoji_folder() / "pictures.zip"


def _icons(folder: Path, package: str, colour: str, names: tuple[str, ...]) -> None:
    body = f'<rect x="4" y="4" width="24" height="24" fill="{colour}"/>'
    (folder / package).mkdir(parents=True)
    icons = {"width": 32, "height": 32, "icons": {name: {"body": body} for name in names}}
    (folder / package / "icons.json").write_text(json.dumps(icons), encoding="utf-8")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "@iconify-json"
    names = ("red-heart", "blue-heart", "pizza", "hand-medium-skin-tone")  # pizza is held out
    for style, colour in zip(STYLES[:4], ("#f00", "#0f0", "#00f", "#ff0"), strict=True):
        _icons(folder, style.package, colour, names)
    _icons(folder, "fxemoji", "#0ff", ("redheart", "somethingelse"))
    return folder


def test_build_renders_common_concepts_in_every_style(packages: Path, tmp_path: Path) -> None:
    output = tmp_path / "pictures.zip"
    counts = build(packages, output)
    assert (
        sum(counts.values()) == 4 * 3 + 1
    )  # three concepts in four styles, skin tones left out, one more from the fifth
    train, held_out = load_images(output, "train"), load_images(output, "held_out")
    assert (len(train), len(held_out)) == (counts["train"], counts["held_out"]) == (9, 4)
    heart = to_pixels(train.images[[train.find("red-heart", style) for style in STYLE_NAMES]])
    colours = heart[:, :, 32, 32]
    expected = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1]])
    assert torch.equal(colours.round().long(), expected)
    assert (heart[:, :, 0, 0] == 1).all()  # white around


def test_build_is_reproducible(packages: Path, tmp_path: Path) -> None:
    build(packages, tmp_path / "a.zip")
    build(packages, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_build_names_the_missing_package(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="npm install @iconify-json/fluent-emoji"):
        build(tmp_path, tmp_path / "pictures.zip")


def test_an_empty_split_is_named(packages: Path, tmp_path: Path) -> None:
    output = tmp_path / "pictures.zip"
    build(packages, output)
    with zipfile.ZipFile(output) as archive:
        rows = archive.read("metadata.jsonl").decode().replace("held_out", "elsewhere")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("metadata.jsonl", rows)
    with pytest.raises(ValueError, match=r"other\.zip: no images in split 'held_out' \(13 in all\)"):
        load_images(tmp_path / "other.zip", "held_out")


def test_an_icon_that_is_not_square_is_centred() -> None:
    icons = {"icons": {"bar": {"body": '<rect width="40" height="20" fill="#000"/>', "width": 40, "height": 20}}}
    image = render(svg(icons, "bar"))
    assert image.size == (64, 64)
    assert image.getpixel((32, 32)) == (0, 0, 0)
    assert image.getpixel((32, 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("red-heart", "blue-heart"),
        ("man-firefighter", "woman-firefighter"),
        ("five-oclock", "eight-thirty"),
        ("backhand-index-pointing-left", "backhand-index-pointing-right"),
        ("keycap-1", "keycap-9"),
    ],
)
def test_look_alikes_fall_on_the_same_side(one: str, other: str) -> None:
    assert twin_group(one) == twin_group(other)
    assert is_held_out(one) == is_held_out(other)


def test_the_bundled_split_shares_no_concept_and_no_look_alike() -> None:
    with zipfile.ZipFile(IMAGES) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
    groups = {s: {twin_group(r["concept"]) for r in rows if r["split"] == s} for s in ("train", "held_out")}
    assert not groups["train"] & groups["held_out"]
    train = {(row["concept"], row["style"]) for row in rows if row["split"] == "train"}
    for concept in TEXT_CONCEPTS:
        assert {(concept, style.name) for style in STYLES[:4]} <= train
    assert all(row["text"] == caption(row["concept"]) for row in rows)


def test_find_names_what_is_missing() -> None:
    held_out = load_images(IMAGES, "held_out")
    with pytest.raises(KeyError, match="no image of 'unicorn-car' in style 'noto'"):
        held_out.find("unicorn-car", "noto")


def test_pixels_and_bytes_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 3, 64, 64)
    (image,) = to_pil_images(to_pixels(images))
    assert torch.equal(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), images[0])


def test_the_bundled_prompts_are_the_held_out_images(tmp_path: Path) -> None:
    save_prompts(IMAGES, tmp_path)
    made = sorted(tmp_path.iterdir())
    shipped = sorted((emoji_folder() / PROMPTS).iterdir())
    assert [file.name for file in made] == [file.name for file in shipped]
    for one, other in zip(made, shipped, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
