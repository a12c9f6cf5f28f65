"""The factory of the next emoji model: every part runs, and what is kept from training is kept."""

from __future__ import annotations

import importlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from ipadapter_core.assets import MODEL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
build, concepts, views = (importlib.import_module(f"tools.emoji.{name}") for name in ("build", "concepts", "views"))


def test_images_of_every_split() -> None:
    splits = {(c, s.name): build.split_of(c, s.name) for c in concepts.CONCEPTS for s in build.STYLES}
    assert len(set(concepts.CONCEPTS)) == len(concepts.CONCEPTS) > 400
    for concept in concepts.CONCEPTS:
        of = [splits[concept, style.name] for style in build.STYLES]
        assert of.count("held_out") <= 1  # known from at least four styles
        assert of.count("unseen") in (0, 5)
    assert all(splits[concept, s.name] == "train" for concept in concepts.TEXT_CONCEPTS for s in build.STYLES)
    assert all(splits[prompt] == "held_out" for prompt in concepts.PROMPT_IMAGES)
    assert len({style for _, style in concepts.PROMPT_IMAGES}) == len(build.STYLES)
    counts = {split: list(splits.values()).count(split) for split in ("train", "held_out", "unseen")}
    assert counts["held_out"] > 128
    assert counts["unseen"] > 100


def test_views_keep_the_white_background_and_the_grid_of_pixel_art() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.ones(64, 3, 128, 128)
    image[:, 0, 8:16, 8:24] = -1.0
    shifted = views.shift(image, generator, views.LATENT)
    cells = torch.nn.functional.avg_pool2d(shifted[:, :1], views.LATENT)
    assert set(cells.unique().tolist()) == {-1.0, 1.0}  # whole cells
    assert len({tuple(map(tuple, cell[0].tolist())) for cell in cells}) == 9
    for permutation in range(1, 6):
        other = views.recolour(image, permutation)
        assert other.sum() == image.sum()
        assert (other == 1).all(1).sum() == (image == 1).all(1).sum()
    each = views.recolour(image[:6], torch.arange(6))
    assert all(torch.equal(each[i], views.recolour(image[:6], i)[i]) for i in range(6))
    assert views.zoom(image, generator).amax() <= 1.0 + 1e-5


@pytest.fixture(scope="module", params=[32, 64])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An images.zip of some concepts, drawn by rules: every concept a colour, every style a shape."""
    file = tmp_path_factory.mktemp("emoji") / "pictures.zip"
    known = [concept for concept, _ in concepts.PROMPT_IMAGES] + list(concepts.TEXT_CONCEPTS[:2])
    unseen = [c for c in concepts.CONCEPTS if build.split_of(c, "noto") == "unseen"][:2]
    rows = []
    with zipfile.ZipFile(file, "w") as archive:
        for number, concept in enumerate((*known, *unseen)):
            for size, style in enumerate(build.STYLES, 2):
                image = Image.new("RGB", (128, 128), "white")
                colour = (20 * number, 255 - 20 * number, 40 * size)
                ImageDraw.Draw(image).ellipse((20, 20, 30 * size - 20, 110), fill=colour)
                split, data = build.split_of(concept, style.name), io.BytesIO()
                image.resize((request.param, request.param)).save(data, "PNG")
                name = f"{split}/{style.name}/{concept}.png"
                archive.writestr(name, data.getvalue())
                rows.append({"file_name": name, "text": build.caption(concept), "concept": concept})
                rows[-1] |= {"style": style.name, "split": split}
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_part_trains_and_the_result_is_measured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, quality = (importlib.import_module(f"tools.emoji.{name}") for name in ("train", "quality"))
    model = tmp_path / "model"
    where = ["--images", str(images), "--work", str(tmp_path / "work"), "--output", str(model)]
    parts = ["vae", "clip", "concepts", "styles", "unet", "export", "plus", "base", "decoder", "vision", "export"]
    monkeypatch.setattr(sys, "argv", ["train", *parts, *where, "--steps", "1", "--batch-size", "2", "--views", "1"])
    train.main()
    assert StableDiffusionPipeline.from_pretrained(model / MODEL).unet.config["sample_size"] > 0
    monkeypatch.setattr(quality, "STEPS", 2)
    output, sheet = tmp_path / "quality.json", tmp_path / "sheet.png"
    files = ["--folder", str(model), "--images", str(images), "--output", str(output), "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["quality", *files, "--prompts", "3"])
    quality.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["image_alone"]["prompts"] == 3
    assert found["unseen_concept"]["prompts"] == 2
    for asked in ("image_alone", "image_and_text", "image_and_its_name", "unseen_concept"):
        for who in ("adapter", "weight_0", "shuffled_references"):
            assert all(0 <= share <= 1 for share in found[asked][who].values())
    images = train.load_images(images, "train")
    with Image.open(sheet) as image:
        assert image.width > 6 * images.size
    prompts = list((model / "prompts").glob("*.png"))
    assert len(prompts) == len(concepts.PROMPT_IMAGES)
    with Image.open(prompts[0]) as image:
        assert image.size == (images.size, images.size)
    train.PARTS["unpack"](train.Run(images, images, tmp_path / "again", model, 1, 1.0))
    assert (tmp_path / "again" / "unet.pt").is_file()
