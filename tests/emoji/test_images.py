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
from ipadapter_trainer.demo.emoji import STYLE_NAMES, caption, load_images, to_pixels
from tools.emoji.build import STYLES, build, render, split_of, svg
from tools.emoji.concepts import CONCEPTS, PROMPT_IMAGES, UNSEEN_CONCEPTS
from tools.emoji.images import save_prompts

ROOT = Path(__file__).resolve().parents[2]

IMAGES = emoji_folder() / "pictures.zip"


def _icons(folder: Path, package: str, colour: str, names: tuple[str, ...]) -> None:
    body = f'<rect x="4" y="4" width="24" height="24" fill="{colour}"/>'
    (folder / package).mkdir(parents=True)
    icons = {"width": 32, "height": 32, "icons": {name: {"body": body} for name in names}}
    (folder / package / "icons.json").write_text(json.dumps(icons), encoding="utf-8")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The five packages, with two known concepts and an unseen one; they differ in their hyphens."""
    monkeypatch.setattr("tools.emoji.build.CONCEPTS", ("red-heart", "crab"))
    monkeypatch.setattr("tools.emoji.build.UNSEEN_CONCEPTS", ("wine-glass",))
    folder = tmp_path / "@iconify-json"
    for style, colour in zip(STYLES, ("#f00", "#0f0", "#00f", "#ff0", "#0ff"), strict=True):
        heart = "redheart" if style.name == "pixel" else "red-heart"
        _icons(folder, style.package, colour, (heart, "crab", "wine-glass", "hand-medium-skin-tone"))
    return folder


def test_build_renders_the_concepts_in_every_style(packages: Path, tmp_path: Path) -> None:
    output = tmp_path / "pictures.zip"
    counts = build(packages, output, 64)
    assert counts == {"train": 9, "held_out": 1, "unseen": 5}  # the crab of Twemoji is held out
    train, held_out = load_images(output, "train"), load_images(output, "held_out")
    assert (len(train), held_out.concepts, held_out.styles) == (9, ("crab",), ("twemoji",))
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
    with pytest.raises(ValueError, match=r"other\.zip: no images in split 'held_out' \(15 in all\)"):
        load_images(tmp_path / "other.zip", "held_out")


def test_an_icon_that_is_not_square_is_centred() -> None:
    icons = {"icons": {"bar": {"body": '<rect width="40" height="20" fill="#000"/>', "width": 40, "height": 20}}}
    image = render(svg(icons, "bar"), size=64)
    assert image.size == (64, 64)
    assert image.getpixel((32, 32)) == (0, 0, 0)
    assert image.getpixel((32, 4)) == (255, 255, 255)


def test_the_bundled_images_are_those_of_the_concepts() -> None:
    with zipfile.ZipFile(IMAGES) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
    splits = {(row["concept"], row["style"]): row["split"] for row in rows}
    every = (*CONCEPTS, *UNSEEN_CONCEPTS)
    assert splits == {(concept, style): split_of(concept, style) for concept in every for style in STYLE_NAMES}
    assert len(splits) == len(rows)
    assert all(row["text"] == caption(row["concept"]) for row in rows)


def test_the_help_page_lists_the_names_that_the_model_knows() -> None:
    page = (ROOT / "web" / "docs" / "LoadIPAdapterDemo.md").read_text(encoding="utf-8")
    listed = " ".join(page.split("## The names it knows")[1].split("##")[0].split())
    assert listed.rstrip(".").split(", ") == sorted(map(caption, CONCEPTS))


def test_the_styles_of_the_captions_are_the_packages() -> None:
    assert tuple(style.name for style in STYLES) == STYLE_NAMES


def test_find_names_what_is_missing() -> None:
    held_out = load_images(IMAGES, "held_out")
    with pytest.raises(KeyError, match="no image of 'unicorn-car' in style 'noto'"):
        held_out.find("unicorn-car", "noto")


def test_pixels_and_bytes_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 3, 64, 64)
    (image,) = to_pil_images(to_pixels(images))
    assert torch.equal(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), images[0])


def test_the_bundled_prompts_are_held_out_images() -> None:
    held_out = load_images(IMAGES, "held_out")
    shipped = sorted((emoji_folder() / PROMPTS).iterdir())
    assert {file.stem for file in shipped} == {f"{concept}_{style}" for concept, style in PROMPT_IMAGES}
    for file in shipped:
        row = held_out.find(*file.stem.rsplit("_", 1))
        assert np.array_equal(np.asarray(Image.open(file)), held_out.images[row].permute(1, 2, 0).numpy())


def test_prompts_are_written_as_held_out_images(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.emoji.images.PROMPT_IMAGES", (("crab", "twemoji"),))
    build(packages, tmp_path / "pictures.zip", 64)
    save_prompts(tmp_path / "pictures.zip", tmp_path / "prompts")
    (file,) = (tmp_path / "prompts").iterdir()
    assert file.name == "crab_twemoji.png"
    crab = load_images(tmp_path / "pictures.zip", "held_out").images[0]
    assert np.array_equal(np.asarray(Image.open(file)), crab.permute(1, 2, 0).numpy())
