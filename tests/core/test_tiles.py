"""Square tiles of an image."""

from __future__ import annotations

import pytest
import torch

from ipadapter_core import AdapterError
from ipadapter_core.image_prompt import crop_image
from ipadapter_core.tiles import tile_boxes, tile_image


@pytest.mark.parametrize(
    ("height", "width", "tiles", "boxes"),
    [
        (40, 64, 1, [(0, 0), (0, 24)]),
        (64, 40, 1, [(0, 0), (24, 0)]),
        (40, 120, 1, [(0, 0), (0, 40), (0, 80)]),
        (40, 40, 2, [(0, 0), (0, 20), (20, 0), (20, 20)]),
        (40, 80, 2, [(0, 0), (0, 20), (0, 40), (0, 60), (20, 0), (20, 20), (20, 40), (20, 60)]),
        (41, 43, 2, [(0, 0), (0, 23), (21, 0), (21, 23)]),
    ],
)
def test_boxes(height, width, tiles, boxes):
    found = tile_boxes(height, width, tiles)
    assert [box[:2] for box in found] == boxes
    assert len({box[2] for box in found}) == 1
    for top, left, side in found:
        assert top + side <= height and left + side <= width


@pytest.mark.parametrize("size", [(33, 47), (64, 200), (100, 101), (7, 300)])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_tiles_cover_the_image(size, tiles):
    try:
        boxes = tile_boxes(*size, tiles)
    except AdapterError as error:
        assert size == (100, 101) or "at most 64" in str(error)
        return
    covered = torch.zeros(size)
    for top, left, side in boxes:
        covered[top : top + side, left : left + side] = 1
    assert covered.mean() > 0.9


def test_tiles_are_the_parts_at_the_encoders_size():
    image = torch.rand(2, 30, 60, 3)
    tiles = tile_image(image, 16, 1)
    parts = [image[i : i + 1, :, left : left + 30] for i in (0, 1) for left in (0, 30)]
    assert torch.equal(tiles, torch.cat([crop_image(part, 16) for part in parts]))


def test_a_mask_hides_pixels_and_whole_tiles():
    image, mask = torch.rand(2, 30, 60, 3), torch.zeros(30, 60)
    mask[:, :15] = 1.0
    tiles = tile_image(image, 30, 1, mask=mask, fill=(0.0, 0.5, 1.0))
    assert len(tiles) == 2
    assert torch.equal(tiles[0, :, :15], image[0, :, :15])
    assert (tiles[:, :, 15:] == torch.tensor([0.0, 0.5, 1.0])).all()


def test_a_mask_between_the_tiles_is_refused():
    image, mask = torch.rand(1, 100, 205, 3), torch.zeros(100, 205)
    mask[:, 101:104] = 1.0
    with pytest.raises(AdapterError, match="All 2 tiles of image are hidden by the mask"):
        tile_image(image, 30, 1, mask=mask)
