from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
from PIL import Image

from ipadapter_trainer.data.augmentation import SampleIndex
from ipadapter_trainer.data.buckets import BucketBatchSampler, assign, make_buckets, read_sizes
from ipadapter_trainer.data.examples import Example
from ipadapter_trainer.errors import ConfigError, DataError

# SDXL's resolutions with a ratio of at most 2.1 (arXiv 2307.01952, appendix I).
SDXL = [
    *[(704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1152), (832, 1216), (896, 1088), (896, 1152)],
    *[(960, 1024), (960, 1088), (1024, 960), (1024, 1024), (1088, 896), (1088, 960), (1152, 832), (1152, 896)],
    *[(1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704)],
]


def test_buckets_are_the_largest_of_sdxls() -> None:
    buckets = make_buckets(1024, 64, max_ratio=2.1)
    assert set(buckets) <= set(SDXL)
    assert {(1024, 1024), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)} <= set(buckets)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (512, 8), (500, 64), (64, 32), (768, 64)])
def test_a_bucket_fits_the_area_and_no_step_more_would(resolution: int, step: int) -> None:
    buckets = make_buckets(resolution, step)
    square = resolution // step * step
    assert (square, square) in buckets
    assert list(buckets) == sorted(buckets, key=lambda size: size[0] / size[1])
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)
        assert (height, width) in buckets
        if (width, height) != (square, square):
            assert min(width, height) * (max(width, height) + step) > resolution**2


def test_a_resolution_below_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="resolution = 32 is less than bucket_step = 64"):
        make_buckets(32)


def test_images_go_into_the_bucket_of_the_nearest_shape() -> None:
    buckets = ((32, 64), (64, 64), (64, 32))
    sizes = [(640, 640), (300, 600), (600, 300), (100, 2000), (66, 64), None, (80, 60), (90, 60)]
    found = assign(sizes, buckets)
    # Row 5 goes into the fullest: nothing is known of it. Row 7 is nearer to 2:1 than to 1:1, in ratio.
    assert dict(zip(found.sizes, found.rows, strict=True)) == {
        (32, 64): (1, 3),
        (64, 64): (0, 4, 5, 6),
        (64, 32): (2, 7),
    }
    assert assign(sizes[1:2], buckets).sizes == ((32, 64),)  # empty ones are left out


def test_small_buckets_are_given_up() -> None:
    buckets = make_buckets(64, 16)
    sizes = [(64, 64)] * 5 + [(64, 32)] * 2 + [(32, 64)]
    assert len(assign(sizes, buckets).rows) == 3
    merged = assign(sizes, buckets, at_least=2)
    assert sorted(map(len, merged.rows)) == [2, 6]
    assert sorted(row for rows in merged.rows for row in rows) == list(range(8))
    assert len(assign(sizes, buckets, at_least=100).rows) == 1


def test_nothing_known_is_one_square_bucket() -> None:
    assert assign([None, None], make_buckets(64, 16)).sizes == ((64, 64),)
    with pytest.raises(DataError):
        assign([], make_buckets(64, 16))


def test_sizes_are_read_from_lists_headers_and_memory(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=turned)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:50])  # the header is there, the pixels are not
    (tmp_path / "none.png").write_text("no image")
    examples = [Example(tmp_path / name, "") for name in ("a.png", "turned.jpg", "cut.png", "none.png", "absent.png")]
    examples += [Example(Image.new("RGB", (7, 9)), ""), Example(tmp_path / "absent.png", "", size=(3, 4))]
    assert read_sizes(examples) == [(30, 20), (20, 30), (30, 20), None, None, (7, 9), (3, 4)]
    assert assign(read_sizes(examples[:2]), make_buckets(64, 16)).rows == ((1,), (0,))


def drawn(*arguments: object, number: int) -> list[list[SampleIndex]]:
    return list(islice(BucketBatchSampler(*arguments), number))  # type: ignore[arg-type]


def test_an_epoch_has_every_row_and_another_order_each() -> None:
    batches = drawn([range(8)], 2, 1, number=12)
    for epoch in range(3):
        part = [draw for batch in batches[4 * epoch : 4 * epoch + 4] for draw in batch]
        assert sorted(draw.row for draw in part) == list(range(8))
        assert {(draw.epoch, draw.repeat) for draw in part} == {(epoch, 0)}
    together = [{frozenset(draw.row for draw in batch) for batch in batches[4 * i : 4 * i + 4]} for i in range(3)]
    assert together[0] != together[1] != together[2]


def test_a_batch_is_of_one_bucket_and_full() -> None:
    rows = [(0, 1, 2, 3, 4), (5, 6), (7,)]
    sampler = BucketBatchSampler(rows, 4, seed=2)
    assert sampler.per_epoch == 4
    epoch = list(islice(sampler, 4))
    for batch in epoch:
        assert len(batch) == 4
        assert sum(set(members) >= {draw.row for draw in batch} for members in rows) == 1
        assert len(set(batch)) == 4  # a row that comes again is another draw, with noise of its own
    seen = Counter(draw.row for batch in epoch for draw in batch)
    assert set(seen) == set(range(8))
    assert sorted(seen[row] for row in range(5)) == [1, 1, 2, 2, 2]  # filled up from the start of the order
    assert (seen[5], seen[6], seen[7]) == (2, 2, 4)
    assert [draw.repeat for batch in epoch for draw in batch if draw.row == 7] == [0, 1, 2, 3]


def test_batches_of_the_buckets_are_mixed() -> None:
    first = [{draw.row < 40 for draw in batch} for batch in drawn([range(40), range(40, 80)], 2, 0, number=40)]
    switches = sum(a != b for a, b in pairwise(first))
    assert switches > 8


def test_a_start_skips_and_a_seed_changes() -> None:
    rows = [range(7), range(7, 10)]
    batches = drawn(rows, 3, 1, number=20)
    for start in (0, 1, 4, 5, 11):
        assert list(islice(BucketBatchSampler(rows, 3, 1, start), 20 - start)) == batches[start:]
        assert list(islice(BucketBatchSampler(rows, 3, 1).starting_at(start), 20 - start)) == batches[start:]
    assert drawn(rows, 3, 2, number=20) != batches
