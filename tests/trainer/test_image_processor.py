"""Images for the image encoder are prepared as transformers' CLIPImageProcessor does, strips in no time."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ipadapter_trainer.models import image_processor
from ipadapter_trainer.models.image_processor import CLIPImageProcessor

SIZES = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    return noise(9, 9).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def theirs() -> object:
    return image_processor._Processor(**SIZES)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (200, 301), (20, 33), (1, 8), (400, 50), (57, 113)])
def test_ordinary_images_have_the_very_values_of_transformers(theirs, size) -> None:
    ours = CLIPImageProcessor(**SIZES)
    for images in (noise(*size), [noise(*size), noise(80, 80)], np.asarray(noise(*size))):
        seen = [p(images=images, return_tensors="pt").pixel_values for p in (ours, theirs)]
        assert torch.equal(*seen)


@pytest.mark.parametrize("size", [(900, 100), (100, 901), (701, 80), (75, 1000), (1000, 41)])
def test_of_a_strip_the_middle_is_seen(theirs, size) -> None:
    """Within a level of eight bits and half a pixel of the source, which transformers rounds away."""
    image = smooth(*size)
    ours, full = (p(images=image, return_tensors="pt").pixel_values for p in (CLIPImageProcessor(**SIZES), theirs))
    assert ours.shape == full.shape == (1, 3, 56, 56)
    assert (ours - full).abs().max() < 0.1
    assert (ours - full.flip(-1)).abs().max() > 0.1  # what else would differ by


def test_a_strip_takes_no_time_and_travels_to_workers() -> None:
    ours = pickle.loads(pickle.dumps(CLIPImageProcessor()))
    ours(images=noise(64, 64), return_tensors="pt")
    start = time.perf_counter()
    for size in ((8192, 4), (4, 8192), (20_000, 1)):
        assert ours(images=noise(*size), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
    assert time.perf_counter() - start < 1  # transformers: 15 s and 1.4 GB for the first
