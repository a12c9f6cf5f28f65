"""The factory of the emoji model: every part runs, and what is kept from training is kept."""

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

from ipadapter_core import load_adapter
from ipadapter_core.assets import MODEL
from ipadapter_trainer.demo import views as demo_views
from ipadapter_trainer.demo.emoji import caption

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
build, concepts, drawings, efficientnet, emoji_images, judges, views = (
    importlib.import_module(f"tools.emoji.{name}")
    for name in ("build", "concepts", "drawings", "efficientnet", "images", "judges", "views")
)


def test_images_of_every_split() -> None:
    every = (*concepts.CONCEPTS, *concepts.UNSEEN_CONCEPTS)
    splits = {(c, s.name): build.split_of(c, s.name) for c in every for s in build.STYLES}
    assert len(set(every)) == len(every) > 220
    for concept in every:
        of = [splits[concept, style.name] for style in build.STYLES]
        assert of.count("held_out") <= 1  # known from at least four styles
        assert of.count("unseen") == (5 if concept in concepts.UNSEEN_CONCEPTS else 0)
    assert all(splits[concept, s.name] == "train" for concept in concepts.TEXT_CONCEPTS for s in build.STYLES)
    assert all(splits[prompt] == "held_out" for prompt in concepts.PROMPT_IMAGES)
    assert len({style for _, style in concepts.PROMPT_IMAGES}) == len(build.STYLES)
    counts = {split: list(splits.values()).count(split) for split in ("train", "held_out", "unseen")}
    assert counts["held_out"] > 128
    assert counts["unseen"] > 100


def test_what_the_first_release_saw_is_not_held_out() -> None:
    # Its adapter and its model knew the plain drawings of all concepts but these.
    plain = {style.name for style in build.STYLES if style.drawing == "plain"}
    for concept in concepts.CONCEPTS:
        kept = {style.name for style in build.STYLES if build.split_of(concept, style.name) == "held_out"}
        assert kept <= plain if concept in concepts.NEW_CONCEPTS else not kept & plain
    assert set(concepts.NEW_CONCEPTS) <= set(concepts.CONCEPTS)


def test_drawings_show_nothing_that_is_kept_from_training() -> None:
    names = {*concepts.CONCEPTS, *concepts.UNSEEN_CONCEPTS, "elsewhere"}
    icons = list(drawings.list_icons(dict.fromkeys(drawings.DESIGNERS, names)))
    trained = [icon for icon in icons if drawings.may_train(icon)]
    assert {icon.concept for icon in trained} == {*concepts.CONCEPTS, "elsewhere"}
    for icon in trained:
        kept = drawings.kept_style(icon.concept) if icon.concept in concepts.CONCEPTS else None
        if kept is not None:
            assert icon.style != kept.name
            assert drawings.DESIGNERS[icon.package] != drawings.DESIGNERS[kept.package]
    of_crab = {(icon.package, icon.drawing) for icon in trained if icon.concept == "crab"}  # held out: twemoji's
    assert ("noto", "comic") in of_crab and not any(package == "twemoji" for package, _ in of_crab)
    assert len([icon for icon in icons if icon.concept == "crab"]) == 3 * len(drawings.DESIGNERS)


def test_share_alike_drawings_are_for_the_encoder_alone(tmp_path: Path, images: Path) -> None:
    def row(concept: str, style: str, split: str) -> tuple[dict[str, str], Image.Image]:
        name = f"{split}/{style or 'plain'}/{concept}.webp"
        labels = {"file_name": name, "text": concept, "concept": concept, "style": style, "split": split}
        return labels, Image.new("RGB", (64, 64))

    file = tmp_path / "drawings.zip"
    rows = [("crab", "pixel"), ("crab", "noto"), ("elsewhere", "comic"), ("elsewhere", "")]
    build.write_images(file, [row(*names, "train") for names in rows] + [row("crab", "comic", "share_alike")])
    train = drawings.load_images(images, "train")
    assert len(emoji_images.load_drawings(train, file).images) == len(train) + 5
    known, others = emoji_images.load_more_images(train, file)
    assert list(zip(known.concepts, known.styles, strict=True))[len(train) :] == [("crab", "pixel")]
    assert known.captions[-1] == "crab" and len(known.images) == len(train) + 1
    assert (others.concepts, others.styles) == (("elsewhere",), ("comic",))
    assert emoji_images.load_more_images(train, None) == (train, train)


def test_near_copies_are_found(images: Path) -> None:
    near_copies = drawings.NearCopies(images)
    kept = Image.fromarray(drawings.load_images(images, "held_out").images[0].permute(1, 2, 0).numpy())
    assert kept in near_copies
    assert kept.transpose(Image.Transpose.FLIP_LEFT_RIGHT) in near_copies
    other = kept.convert("RGB").rotate(90, fillcolor="white")
    ImageDraw.Draw(other).rectangle((0, 0, 20, 60), fill="black")
    assert other not in near_copies


def test_efficientnet_takes_the_published_weights(tmp_path: Path) -> None:
    network = efficientnet.EfficientNet(1000)
    # Names and shapes of efficientnet-lite0-57934424.pth.
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(shapes) == 296
    assert shapes["_conv_stem.weight"] == (32, 3, 3, 3)
    assert shapes["_blocks.1._expand_conv.weight"] == (96, 16, 1, 1)
    assert shapes["_blocks.15._bn2.running_var"] == (320,)
    assert shapes["_conv_head.weight"] == (1280, 320, 1, 1)
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    smaller = efficientnet.EfficientNet(7)
    smaller.load_imagenet(file)
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        logits, states = smaller.eval().logits_and_map(pixels)
        assert torch.equal(states, network.eval().logits_and_map(pixels)[1])
    assert logits.shape == (1, 7)


def test_judges_are_stored_in_a_byte_a_weight() -> None:
    torch.manual_seed(0)
    network = efficientnet.EfficientNet(5)
    state = judges.compressed(network.state_dict())
    read = judges.classifier_state({f"concepts.{key}": value for key, value in state.items()}, "concepts")
    assert read.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert (read[key] - value.float()).abs().max() <= 0.005 * value.float().abs().max() + 1e-6, key
    assert sum(v.numel() * v.element_size() for v in state.values()) < 1.2 * sum(v.numel() for v in state.values())


def test_views_keep_the_white_background_and_the_grid_of_pixel_art() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.ones(64, 3, 128, 128)
    image[:, 0, 8:16, 8:24] = -1.0
    shifted = demo_views.shift(image, generator, demo_views.LATENT)
    cells = torch.nn.functional.avg_pool2d(shifted[:, :1], demo_views.LATENT)
    assert set(cells.unique().tolist()) == {-1.0, 1.0}  # whole cells
    assert len({tuple(map(tuple, cell[0].tolist())) for cell in cells}) == 9
    for permutation in range(1, 6):
        other = demo_views.recolour(image, permutation)
        assert other.sum() == image.sum()
        assert (other == 1).all(1).sum() == (image == 1).all(1).sum()
    each = demo_views.recolour(image[:6], torch.arange(6))
    seeded = (demo_views.shift(image, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(*seeded)
    assert all(torch.equal(each[i], demo_views.recolour(image[:6], i)[i]) for i in range(6))
    assert views.zoom(image, generator).amax() <= 1.0 + 1e-5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An images.zip of some concepts, drawn by rules: every concept a colour, every style a shape."""
    file = tmp_path_factory.mktemp("emoji") / "pictures.zip"
    known = [concept for concept, _ in concepts.PROMPT_IMAGES] + list(concepts.TEXT_CONCEPTS[:2])
    unseen = concepts.UNSEEN_CONCEPTS[:2]
    rows = []
    with zipfile.ZipFile(file, "w") as archive:
        for number, concept in enumerate((*known, *unseen)):
            for size, style in enumerate(build.STYLES, 2):
                image = Image.new("RGB", (128, 128), "white")
                colour = (20 * number, 255 - 20 * number, 40 * size)
                ImageDraw.Draw(image).ellipse((20, 20, 30 * size - 20, 110), fill=colour)
                split, data = build.split_of(concept, style.name), io.BytesIO()
                image.resize((64, 64)).save(data, "PNG")
                name = f"{split}/{style.name}/{concept}.png"
                archive.writestr(name, data.getvalue())
                rows.append({"file_name": name, "text": caption(concept), "concept": concept})
                rows[-1] |= {"style": style.name, "split": split}
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_part_trains_and_the_result_is_measured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, quality = (importlib.import_module(f"tools.emoji.{name}") for name in ("train", "quality"))
    model = tmp_path / "model"
    where = ["--images", str(images), "--work", str(tmp_path / "work"), "--output", str(model)]
    parts = ["vae", "clip", "teacher", "vision", "concepts", "unet", "styles", "export"]
    parts += ["align", "plus", "base", "decoder", "vision", "export", "judges"]
    monkeypatch.setattr(sys, "argv", ["train", *parts, *where, "--steps", "1", "--batch-size", "2", "--views", "1"])
    train.main()
    assert StableDiffusionPipeline.from_pretrained(model / MODEL).unet.config["sample_size"] > 0
    monkeypatch.setattr(quality, "STEPS", 2)
    monkeypatch.setattr("tools.emoji.sheets.STEPS", 2)
    output, sheet, quiz = tmp_path / "quality.json", tmp_path / "sheet.png", tmp_path / "quiz.png"
    files = {"folder": model, "images": images, "output": output, "sheet": sheet, "quiz": quiz}
    arguments = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    monkeypatch.setattr(sys, "argv", ["quality", *arguments, "--prompts", "3"])
    quality.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["image_alone"]["prompts"] == 3
    assert found["unseen_concept"]["prompts"] == 2
    for asked in ("image_alone", "image_and_text", "image_and_its_name", "unseen_concept"):
        for who in ("adapter", "weight_0", "shuffled_references"):
            assert all(0 <= share <= 1 for share in found[asked][who].values())
    file, images = images, train.load_images(images, "train")
    with Image.open(sheet) as image:
        assert image.width > 5 * images.size
    with Image.open(quiz) as image:
        assert image.width > 8 * images.size
    prompts = list((model / "prompts").glob("*.png"))
    assert len(prompts) == len(concepts.PROMPT_IMAGES)
    with Image.open(prompts[0]) as image:
        assert image.size == (images.size, images.size)
    again = tmp_path / "again"
    train.PARTS["unpack"](train.Run(images=file, train=images, work=again, output=model, steps=1, minutes=1.0))
    for part in ("vae", "clip", "vision", "concepts", "styles", "unet", "plus", "base"):
        assert (again / f"{part}.pt").is_file(), part
    # What was unpacked is trained on as it is: plus does not ask for an alignment, nor undo itself with one.
    where = ["--images", str(file), "--work", str(again), "--output", str(model)]
    monkeypatch.setattr(sys, "argv", ["train", "plus", *where, "--steps", "1", "--batch-size", "2", "--views", "1"])
    train.main()
    assert not (again / "align.pt").exists()
    assert load_adapter(model / "adapter.safetensors").metadata["ipadapter.steps"] == "1"
