"""The share of an image prompt in the attention, and its map."""

from __future__ import annotations

import pytest
import torch

from ipadapter_core import AdapterError, draw_heat, image_share
from ipadapter_core.heat import colour_heat


def test_share():
    share = image_share(torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0]))
    assert share.tolist() == [0.0, 0.5, 0.75, 1.0, 0.0]


def test_colours_grow_brighter_with_the_heat():
    colours = colour_heat(torch.linspace(0, 1, 33).reshape(1, 1, 33))
    assert colours.shape == (1, 1, 33, 3) and float(colours.min()) >= 0.0 and float(colours.max()) <= 1.0
    luminance = (colours * torch.tensor([0.2126, 0.7152, 0.0722])).sum(-1)[0, 0]
    assert (luminance.diff() > 0).all()
    assert torch.equal(colour_heat(torch.tensor([[[-1.0, 2.0]]])), colour_heat(torch.tensor([[[0.0, 1.0]]])))


def test_drawing():
    image = torch.rand(2, 24, 16, 4, generator=torch.Generator().manual_seed(1))
    heat = torch.zeros(2, 3, 2)
    heat[1, :, 1] = 1.0
    plain, large = draw_heat(image, heat, opacity=0.0)
    assert torch.equal(plain, image[..., :3]) and large.shape == (2, 24, 16)
    assert not large[0].any() and large[1, :, 12:].min() == 1.0 and large[1, :, :4].max() == 0.0
    whole, _ = draw_heat(image, heat, opacity=1.0)
    torch.testing.assert_close(whole, colour_heat(large))


def test_from_least_to_most():
    image, heat = torch.zeros(3, 8, 8, 3), torch.full((3, 4, 4), 0.25)
    heat[1], heat[2] = 0.5, 0.75
    assert draw_heat(image, heat, relative=True)[1][:, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert draw_heat(image, heat)[1][:, 0, 0].tolist() == [0.25, 0.5, 0.75]
    assert not draw_heat(image, heat[:1].expand(3, -1, -1), relative=True)[1].any()


def test_another_number_of_images():
    with pytest.raises(AdapterError, match="There are 3 images and attention maps of 2"):
        draw_heat(torch.zeros(3, 8, 8, 3), torch.zeros(2, 4, 4))
