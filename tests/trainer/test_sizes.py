from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ipadapter_trainer.data.buckets import SAMPLE, sample_sizes, size_notes
from ipadapter_trainer.data.check import check_data
from ipadapter_trainer.data.examples import Example, find_examples
from ipadapter_trainer.data.from_config import warn_about_sizes
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training.train import train


def test_what_is_scaled_up_is_counted() -> None:
    sizes = [(512, 512), (511, 900), (900, 511), (2000, 512), None]
    assert size_notes(sizes, 5, 512) == ["Smaller than 512x512 pixels, so scaled up and blurred: 2 of 5 images."]
    assert size_notes(sizes[:1], 1, 512) == []
    assert size_notes([None, None], 2, 512) == []


def test_a_bucket_is_another_target_than_the_square() -> None:
    """A wide image is lower than the square, and its bucket is too."""
    assert size_notes([(900, 480)], 1, 512) != []
    assert size_notes([(900, 480)], 1, 512, 64) == []
    assert size_notes([(600, 320)], 1, 512, 64) == [
        "Smaller than their bucket, so scaled up and blurred: 1 of 1 images."
    ]


def test_buckets_that_cannot_fill_a_batch_are_counted() -> None:
    sizes = [(512, 512)] * 8 + [(1024, 512)] * 2 + [(512, 1024)] * 3
    assert size_notes(sizes, 13, 512, 64, batch_size=3) == [
        "Buckets with fewer images than a batch of 3: 1 of 3; their images go to the next nearest bucket."
    ]
    assert size_notes(sizes, 13, 512, 64, batch_size=4)[0].startswith(
        "Buckets with fewer images than a batch of 4: 2 of 3;"
    )
    assert size_notes(sizes, 13, 512, 64, batch_size=2) == []
    assert size_notes(sizes[:8], 8, 512, 64, batch_size=100) == []  # nowhere else to go


def test_of_many_images_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipadapter_trainer.data import buckets as module

    read: list[int] = []
    monkeypatch.setattr(module, "read_sizes", lambda examples: read.append(len(examples)) or [e.size for e in examples])
    examples = [Example(Path(f"{n}.png"), "", size=(256, 256) if n % 4 == 0 else (600, 600)) for n in range(20_000)]
    found = sample_sizes(examples)
    assert read == [SAMPLE]
    assert found == sample_sizes(examples)
    (note,) = size_notes(found, len(examples), 512)
    small = sum(size == (256, 256) for size in found)
    assert 100 < small < 150
    assert f"about {small * 40:,} of 20,000 images ({small} of a sample of 500)." in note
    notes = size_notes([(512, 512)] * 499 + [(1024, 512)], 20_000, 512, 64, batch_size=64)
    assert notes == [
        "Buckets with fewer images than a batch of 64: 1 of 2, estimated from a sample of 500; their images go to the "
        "next nearest bucket."
    ]


def test_headers_alone_are_read(tmp_path: Path) -> None:
    """Broken behind its header, an image still has a size; one that is missing has none."""
    Image.effect_noise((300, 200), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert sample_sizes([Example(tmp_path / "a.png", ""), Example(tmp_path / "no.png", "")]) == [(300, 200), None]


def test_a_training_and_the_check_warn_about_it(
    settings: dict[str, Any], images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (60, 90)).save(images / f"{name}.png")
    config = make_config({**settings, "steps": 1})
    line = "Smaller than 64x64 pixels, so scaled up and blurred: 2 of 6 images."
    with caplog.at_level(logging.WARNING):
        warn_about_sizes(config, find_examples(images))
    assert caplog.messages == [line]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(config)
    assert caplog.messages.count(line) == 1
    report = check_data(images, min_side=128)
    assert report.size_notes[0] == "Smaller than their bucket, so scaled up and blurred: 6 of 6 images."
    assert f"at 128 px         {report.size_notes[0]}" in report.as_text()
    assert json.dumps(report.as_json())
