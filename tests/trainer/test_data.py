from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipadapter_trainer.data.augmentation import Augmentation, SampleIndex, crop_params, noise_params
from ipadapter_trainer.data.buckets import BucketBatchSampler, Buckets
from ipadapter_trainer.data.dataset import ImageDataset, collate, loader
from ipadapter_trainer.data.examples import Example, find_examples
from ipadapter_trainer.data.face_embeds import with_faces
from ipadapter_trainer.data.images import crop_to_area, open_rgb, resize_and_crop, to_rgb, upright_size
from ipadapter_trainer.data.preprocess import Preprocessor
from ipadapter_trainer.errors import ConfigError, DataError
from ipadapter_trainer.models.base_model import BaseModel

from .tiny_data import assert_same, preprocessor_from_config

LATENT = (4, 8, 8)


@pytest.fixture
def preprocessor(base_model: BaseModel) -> Preprocessor:
    return preprocessor_from_config(base_model)


def plain(resolution: int = 64, **changes: Any) -> Augmentation:
    """Nothing is dropped."""
    return Augmentation(resolution, **{"image_dropout": 0.0, "text_dropout": 0.0, "both_dropout": 0.0, **changes})


def image(size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Every pixel and both directions differ."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8))


# --- Items


def test_an_item_has_the_originals_names_and_ranges(preprocessor: Preprocessor) -> None:
    red, reference = Image.new("RGB", (80, 64), "red"), Image.new("RGB", (40, 90), "blue")
    item = ImageDataset([Example(red, "a red square", (reference,))], preprocessor, plain())[0]
    assert item["images"].shape == (3, 64, 64)
    assert item["images"][:, 0, 0].tolist() == [1, -1, -1]
    expected = preprocessor.image_processor(images=reference, return_tensors="pt").pixel_values[0]
    assert item["clip_images"].shape == (3, 32, 32)
    assert torch.equal(item["clip_images"], expected)
    tokenizer = preprocessor.tokenizers[0]
    ids = tokenizer("a red square", padding="max_length", max_length=16, return_tensors="pt").input_ids[0]
    assert torch.equal(item["text_input_ids"], ids)
    assert item["drop_image_embeds"] == 0
    assert item["noise"].shape == item["posterior_noise"].shape == LATENT
    assert 0 <= item["timesteps"] < 1000
    assert set(item) - {"broken"} == {
        *("images", "clip_images", "text_input_ids", "original_size", "crop_coords_top_left", "target_size"),
        *("drop_image_embeds", "noise", "posterior_noise", "timesteps"),
    }


def test_sdxl_has_a_second_text_and_its_sizes(preprocessor: Preprocessor, base_model: BaseModel) -> None:
    tokenizer = base_model.tokenizers[0]
    two = replace(
        preprocessor, tokenizers=(tokenizer, lambda texts, **options: tokenizer([f"the {t}" for t in texts], **options))
    )
    dataset = ImageDataset([Example(image((300, 100)), "blue")], two, plain(), Buckets(((96, 64),), ((0,),)))
    batch = collate([dataset[0]])
    assert not torch.equal(batch["text_input_ids"], batch["text_input_ids_2"])
    assert batch["original_size"].tolist() == [[100, 300]]
    assert batch["target_size"].tolist() == [[64, 96]]
    assert batch["crop_coords_top_left"].tolist() == [[0, (192 - 96) / 2]]  # of the image scaled to 192x64
    assert batch["images"].shape == (1, 3, 64, 96)
    assert batch["noise"].shape == (1, 4, 8, 12)
    assert batch["original_size"].dtype == torch.float32


def test_a_kind_without_images_opens_no_reference(preprocessor: Preprocessor, tmp_path: Path) -> None:
    np.save(tmp_path / "face.npy", np.eye(1, 512, dtype=np.float32))
    example = Example(image(), "a", (tmp_path / "absent.png",), tmp_path / "face.npy")
    faces = replace(preprocessor, image_processor=None, takes_face=True)
    batch = collate([ImageDataset([example], faces, plain())[0]])
    assert "clip_images" not in batch
    assert batch["face_id_embed"].shape == (1, 512)
    assert batch["broken"] == []


def test_a_row_without_its_face_is_replaced(preprocessor: Preprocessor, tmp_path: Path) -> None:
    np.save(tmp_path / "face.npy", np.eye(1, 512, dtype=np.float32))
    np.save(tmp_path / "narrow.npy", np.eye(1, 128, dtype=np.float32))
    examples = [Example(image(), name, (), tmp_path / name) for name in ("narrow.npy", "face.npy")]
    dataset = ImageDataset(with_faces(examples), replace(preprocessor, takes_face=True), plain())
    item = dataset[0]
    assert item["face_id_embed"][0] == 1
    assert "expected a face embedding of 512 values, found the shape (1, 128)" in item["broken"][0]


def test_a_size_that_makes_no_whole_latent_is_refused(preprocessor: Preprocessor) -> None:
    with pytest.raises(ConfigError, match="60x60 pixels: both sides must be multiples of 8"):
        ImageDataset([Example(image(), "a")], preprocessor, plain(60))
    with pytest.raises(DataError, match="empty"):
        ImageDataset([], preprocessor, plain())


# --- Pixels


def test_a_image_covers_its_size_and_is_cut_in_the_centre() -> None:
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (100, 0, 200, 100))
    cut = resize_and_crop(wide, (50, 50))
    assert (cut.image.size, cut.top_left, cut.box) == ((50, 50), (0, 50), (100, 0, 200, 100))
    assert cut.image.getpixel((25, 25)) == (255, 0, 0)
    assert resize_and_crop(Image.new("RGB", (7, 1000)), (64, 128)).image.size == (64, 128)
    assert resize_and_crop(wide, (50, 50), left=0).image.getpixel((25, 25)) == (255, 255, 255)
    assert resize_and_crop(wide, (50, 50), left=1).top_left == (0, 100)


def test_a_square_is_cut_as_the_original_does(preprocessor: Preprocessor) -> None:
    """torchvision's Resize, CenterCrop, ToTensor and Normalize of tutorial_train.py."""
    full = image((101, 64 * 3))
    resized = full.resize((64, int(64 * 192 / 101)), Image.Resampling.BILINEAR)
    top = round((resized.height - 64) / 2)
    pixels = np.array(resized.crop((0, top, 64, top + 64)), dtype=np.float32)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
    item = ImageDataset([Example(full, "a")], preprocessor, plain())[0]
    assert torch.allclose(item["images"], expected, atol=1e-6)


def test_a_share_of_a_image_has_its_shape() -> None:
    part = crop_to_area(image((200, 100)), 0.25, left=1, top=0)
    assert part.size == (100, 50)
    assert part.getpixel((99, 0)) == image((200, 100)).getpixel((199, 0))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),  # what lies beneath is not uncovered
        (Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)), (128, 128, 128)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
    ],
)
def test_every_mode_becomes_rgb(given: Image.Image, expected: tuple[int, ...]) -> None:
    assert to_rgb(given).getpixel((0, 0)) == expected


def test_a_large_jpeg_is_decoded_smaller_but_keeps_its_size(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image((1200, 800)).save(tmp_path / "a.jpg", quality=95, exif=turned)
    small, size = open_rgb(tmp_path / "a.jpg", at_least=128)
    assert (small.size, size) == ((200, 300), (800, 1200))
    full, same = open_rgb(tmp_path / "a.jpg")
    assert full.size == same == size == upright_size(Image.open(tmp_path / "a.jpg"))
    difference = np.abs(np.array(small.resize((64, 96)), float) - np.array(full.resize((64, 96)), float))
    assert difference.mean() < 1


# --- Geometry and randomness


def test_flips_mirror_image_and_reference(preprocessor: Preprocessor) -> None:
    examples = [Example(image((64, 64)), "a"), Example(image((64, 64)), "a", (image((32, 32)),))]
    flipped = ImageDataset(examples, preprocessor, plain(flip=True))
    straight = ImageDataset(examples, preprocessor, plain())
    seen: Counter[bool] = Counter()
    for draw in (SampleIndex(epoch, row) for epoch in range(20) for row in range(2)):
        one, other = straight[draw], flipped[draw]
        mirrored = crop_params(flipped.augmentation, draw.key(0)).flip
        seen[mirrored] += 1
        for key in ("images", "clip_images"):
            assert torch.allclose(one[key].flip(-1) if mirrored else one[key], other[key], atol=0.03)
        assert torch.equal(one["noise"], other["noise"])  # an option changes nothing else
    assert min(seen[True], seen[False]) > 10


def test_a_random_cut_moves_and_its_own_reference_with_it(preprocessor: Preprocessor) -> None:
    dataset = ImageDataset([Example(image((192, 64)), "a")], preprocessor, plain(crop="random"))
    lefts = []
    for epoch in range(20):
        item = dataset[SampleIndex(epoch, 0)]
        left = item["crop_coords_top_left"][1]
        lefts.append(left)
        window = image((192, 64)).crop((int(left), 0, int(left) + 64, 64))
        seen = preprocessor.image_processor(images=window, return_tensors="pt").pixel_values[0]
        assert torch.equal(item["clip_images"], seen)
        assert torch.allclose(item["images"][0], torch.tensor(np.array(window)[..., 0] / 127.5 - 1).float(), atol=1e-6)
    assert min(lefts) < 32 and max(lefts) > 96 and len(set(lefts)) > 10


def test_the_centre_of_a_bucket_leaves_the_reference_whole(preprocessor: Preprocessor) -> None:
    dataset = ImageDataset([Example(image((192, 64)), "a")], preprocessor, plain())
    seen = preprocessor.image_processor(images=image((192, 64)), return_tensors="pt").pixel_values[0]
    assert torch.equal(dataset[0]["clip_images"], seen)


def test_references_are_drawn_and_sometimes_the_image_itself(preprocessor: Preprocessor) -> None:
    references = tuple(Image.new("RGB", (32, 32), colour) for colour in ("red", "lime"))
    own = Image.new("RGB", (64, 64), "blue")
    dataset = ImageDataset([Example(own, "a", references)], preprocessor, plain(self_reference=0.25))
    seen = Counter(int(dataset[SampleIndex(epoch, 0)]["clip_images"][:, 0, 0].argmax()) for epoch in range(200))
    assert 30 < seen[2] < 70
    assert abs(seen[0] - seen[1]) < 40


def test_only_the_reference_is_cropped(preprocessor: Preprocessor) -> None:
    example = Example(image((64, 64)), "a")
    whole, cropped = (ImageDataset([example], preprocessor, plain(reference_crop=share)) for share in (1.0, 0.25))
    spans = []
    for epoch in range(20):
        one, other = whole[SampleIndex(epoch, 0)], cropped[SampleIndex(epoch, 0)]
        assert torch.equal(one["images"], other["images"])
        red = other["clip_images"][0]
        spans.append(float((red.max() - red.min()) / (one["clip_images"][0].max() - one["clip_images"][0].min())))
    assert 0.45 < min(spans) < 0.7 and 0.8 < max(spans) <= 1.01  # sides from a half to all


def test_dropout_shares_and_the_originals_order(preprocessor: Preprocessor) -> None:
    augmentation = Augmentation(8, seed=3)
    seen: Counter[tuple[bool, bool]] = Counter()
    for epoch in range(4000):
        drawn = noise_params(augmentation, (3, epoch, 0), (1, 1, 1))
        seen[drawn.drop_image, drawn.drop_text] += 1
    for dropped in ((True, False), (False, True), (True, True)):
        assert 0.038 < seen[dropped] / 4000 < 0.062
    everything = ImageDataset(
        [Example(image(), "blue")], preprocessor, Augmentation(64, text_dropout=1, image_dropout=0)
    )
    empty = preprocessor.tokenizers[0]("", padding="max_length", max_length=16, return_tensors="pt").input_ids[0]
    assert torch.equal(everything[0]["text_input_ids"], empty)


def test_noise_is_normal_and_its_offset_is_the_channels() -> None:
    shape = (4, 32, 32)
    draws = [noise_params(Augmentation(8), (0, epoch, 0), shape) for epoch in range(50)]
    noise = torch.stack([drawn.noise for drawn in draws])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise * torch.stack([d.posterior_noise for d in draws])).mean())) < 0.02
    timesteps = [drawn.timestep for drawn in draws]
    assert min(timesteps) < 150 and max(timesteps) > 850
    offset = noise_params(Augmentation(8, noise_offset=0.5), (0, 0, 0), shape).noise - noise[0]
    assert torch.allclose(offset, offset[:, :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[:, 0, 0].unique()) == 4


def test_what_is_seen_and_what_is_dropped_are_independent() -> None:
    augmentation = Augmentation(8, crop="random", image_dropout=0.5, text_dropout=0, both_dropout=0)
    rows = [(0, 0, row) for row in range(200)]
    dropped = [
        crop_params(augmentation, row).left for row in rows if noise_params(augmentation, row, (1, 1, 1)).drop_image
    ]
    assert 70 < len(dropped) < 130
    assert abs(sum(dropped) / len(dropped) - 0.5) < 0.1


def test_every_part_of_a_random_key_counts() -> None:
    augmentation = Augmentation(8, crop="random")
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, "a.tar/1"), SampleIndex(0, 0, 1).key(0)]
    drawn = [noise_params(augmentation, key, LATENT) for key in keys]
    assert (
        len({float(d.noise.flatten()[0]) for d in drawn}) == len({crop_params(augmentation, key) for key in keys}) == 6
    )
    assert torch.equal(drawn[0].noise, noise_params(augmentation, (0, 0, 0), LATENT).noise)


# --- Broken images


def test_a_broken_image_is_replaced_and_named(preprocessor: Preprocessor, images: Path) -> None:
    data = (images / "red.png").read_bytes()
    (images / "red.png").write_bytes(data[: len(data) // 2])
    (images / "blue.png").write_text("not an image")
    dataset = ImageDataset(find_examples(images), preprocessor, Augmentation(64))
    items = [dataset[i] for i in range(6)]
    assert sum(bool(item["broken"]) for item in items) == 2
    assert any("red.png" in line for item in items for line in item["broken"])
    assert all(item["images"].shape == (3, 64, 64) for item in items)


def test_a_replacement_is_of_the_same_bucket_if_there_is_one(preprocessor: Preprocessor, tmp_path: Path) -> None:
    absent = tmp_path / "absent.png"
    examples = [
        Example(absent, "a"),
        Example(Image.new("RGB", (64, 64), "blue"), "b"),
        Example(Image.new("RGB", (64, 64), "lime"), "c"),
        Example(absent, "d"),
    ]
    buckets = Buckets(((64, 96), (64, 64)), ((0, 2), (1, 3)))
    dataset = ImageDataset(examples, preprocessor, plain(), buckets)
    assert dataset[0]["images"].shape == (3, 96, 64)
    assert [int(dataset[row]["images"][:, 0, 0].argmax()) for row in range(4)] == [1, 2, 1, 2]
    only = ImageDataset(examples[:2], preprocessor, plain(), Buckets(((64, 96), (64, 64)), ((0,), (1,))))
    assert only[0]["images"].shape == (3, 96, 64)
    assert torch.equal(only[0]["noise"], dataset[0]["noise"])  # of the row that was asked for


def test_a_broken_reference_is_named(preprocessor: Preprocessor, tmp_path: Path) -> None:
    examples = [Example(image(), "a", (tmp_path / "absent.png",)), Example(image(), "b")]
    item = ImageDataset(examples, preprocessor, plain())[0]
    assert "absent.png" in item["broken"][0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_broken_images_is_one_clear_error(
    preprocessor: Preprocessor, images: Path, num_workers: int
) -> None:
    for file in images.glob("*.png"):
        file.write_text("not an image")
    dataset = ImageDataset(find_examples(images), preprocessor, Augmentation(64))
    batches = loader(dataset, BucketBatchSampler([range(6)], 2, 0), batch_size=2, num_workers=num_workers)
    with pytest.raises(DataError, match="None of the 6 images can be read"):
        next(iter(batches))


# --- Batches


@pytest.fixture
def batches_of(preprocessor: Preprocessor, images: Path) -> Callable[..., list[dict[str, Any]]]:
    """The first batches of two buckets under everything random."""
    examples = find_examples(images)
    augmentation = Augmentation(64, seed=5, flip=True, crop="random", noise_offset=0.1, reference_crop=0.5)
    dataset = ImageDataset(examples, preprocessor, augmentation, Buckets(((64, 64), (80, 64)), ((0, 2, 4), (1, 3, 5))))

    def some(number: int, batch_size: int = 4, processes: int = 1, start: int = 0, **options: Any) -> list[Any]:
        sampler = BucketBatchSampler(dataset.buckets.rows, batch_size * processes, seed=5, start=start)
        made = loader(dataset, sampler, batch_size=batch_size, processes=processes, **options)
        return list(islice(made, number))

    return some


def test_workers_do_not_change_the_batches(batches_of: Callable[..., list[Any]]) -> None:
    for alone, helped in zip(batches_of(5, num_workers=0), batches_of(5, num_workers=2), strict=True):
        assert_same(alone, helped)


def test_a_resume_does_not_change_the_batches(batches_of: Callable[..., list[Any]]) -> None:
    whole = batches_of(6, num_workers=0)
    for start in (1, 4):
        for one, other in zip(whole[start:], batches_of(6 - start, num_workers=1, start=start), strict=True):
            assert_same(one, other)


def test_two_processes_share_what_one_has_alone(batches_of: Callable[..., list[Any]]) -> None:
    alone = batches_of(5, num_workers=0)
    parts = [batches_of(5, batch_size=2, processes=2, process=process, num_workers=0) for process in (0, 1)]
    for whole, first, second in zip(alone, *parts, strict=True):
        both = {
            key: torch.cat([first[key], second[key]]) if isinstance(value, torch.Tensor) else value
            for key, value in first.items()
        }
        assert_same(whole, both)


def test_processes_must_make_up_a_global_batch(
    batches_of: Callable[..., list[Any]], preprocessor: Preprocessor
) -> None:
    dataset = ImageDataset([Example(image(), "a")], preprocessor, plain())
    with pytest.raises(ValueError, match="2 x 3 rows are not a global batch of 4"):
        loader(dataset, BucketBatchSampler([[0]], 4, 0), batch_size=3, processes=2)


def test_a_preprocessor_can_be_sent_to_workers(preprocessor: Preprocessor) -> None:
    """Where processes are spawned and not forked, as on macOS and Windows."""
    dataset = ImageDataset([Example(image(), "a red square")], preprocessor, Augmentation(64))
    assert_same(collate([dataset[0]]), collate([pickle.loads(pickle.dumps(dataset))[0]]))
