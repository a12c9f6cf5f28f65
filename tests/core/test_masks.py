"""Masks and images as they come from outside: what they must be, and what long strips cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ipadapter_core import AdapterError
from ipadapter_core.image_prompt import CLIP_MEAN, crop_image
from ipadapter_core.masks import check_attention_mask, check_mask


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (1, 1, 5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    mask = check_mask(torch.ones(shape))
    assert mask.shape == (1, 5, 7)
    assert check_mask(torch.ones(shape, dtype=torch.bool)).dtype is torch.float32
    assert check_mask(torch.ones(shape, dtype=torch.float16)).dtype is torch.float16


def test_values() -> None:
    mask = torch.rand(2, 4, 4)
    assert torch.equal(check_mask(mask), mask)
    assert torch.equal(check_mask(mask * 1.25), (mask * 1.25).clamp(0, 1))
    for wrong, words in (
        (mask * 255, "1 of 2 has values from"),
        (mask - 1.5, "1 of 2 has values from -1"),
        (mask * torch.tensor([1.0, torch.nan])[:, None, None], "2 of 2 holds NaN or infinity"),
        (mask * torch.tensor([1.0, torch.inf])[:, None, None], "2 of 2 holds NaN or infinity"),
        (torch.ones(1, 4, 4, 3), r"shape \(1, 4, 4, 3\)"),
        (torch.ones(0, 4, 4), r"shape \(0, 4, 4\)"),
    ):
        with pytest.raises(AdapterError, match=f"x.*{words}"):
            check_mask(wrong, "x")


def test_attention_masks_act_somewhere() -> None:
    frames = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    assert torch.equal(check_attention_mask(frames), frames)
    with pytest.raises(AdapterError, match="attn_mask is 0 everywhere"):
        check_attention_mask(frames[:1])
    with pytest.raises(AdapterError, match="All 2 masks of attn_mask are 0 everywhere"):
        check_attention_mask(frames * 0)


def whole(image: torch.Tensor, size: int, crop: str) -> torch.Tensor:
    """Resize all of the image, or of its padded square, then crop: simple, and what CLIP's preprocessing does."""
    pixels = image.movedim(-1, 1)
    height, width = pixels.shape[-2:]
    if crop == "pad":
        side = max(height, width)
        canvas = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1).expand(len(image), 3, side, side).clone()
        top, left = (side - height) // 2, (side - width) // 2
        canvas[..., top : top + height, left : left + width] = pixels
        pixels, target = canvas, (size, size)
    else:
        scale = size / min(height, width)
        target = round(scale * height), round(scale * width)
    pixels = F.interpolate(pixels, size=target, mode="bicubic", antialias=True).clamp(0, 1)
    spare_height, spare_width = target[0] - size, target[1] - size
    top = {"top": 0, "bottom": spare_height}.get(crop, spare_height // 2)
    left = {"left": 0, "right": spare_width}.get(crop, spare_width // 2)
    return pixels[..., top : top + size, left : left + size].movedim(1, -1)


@pytest.mark.parametrize("crop", ["center", "top", "bottom", "left", "right", "pad"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (333, 200), (7, 30), (1, 1), (31, 900)])
def test_ordinary_images_are_resized_whole(shape: tuple[int, int], crop: str) -> None:
    image = torch.rand(2, *shape, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(crop_image(image, 32, crop), whole(image, 32, crop), atol=2e-6, rtol=0)


@pytest.mark.parametrize("crop", ["center", "top", "bottom", "left", "right"])
@pytest.mark.parametrize("shape", [(1000, 4), (4, 1000), (999, 3), (2, 777), (500, 1), (3000, 50)])
def test_strips_show_the_same(shape: tuple[int, int], crop: str) -> None:
    """The part that is kept begins at a whole pixel, so it is at most half a pixel of the result off."""
    image = torch.rand(1, *shape, 3, generator=torch.Generator().manual_seed(2))
    smooth = F.avg_pool2d(image.movedim(-1, 1), 3, stride=1, padding=1).movedim(1, -1)
    seen, want = crop_image(smooth, 32, crop), whole(smooth, 32, crop)
    assert (seen - want).abs().max() < 0.05 and (seen - want).abs().mean() < 0.01
    assert want.std() > 0.005


@pytest.mark.parametrize("crop", ["center", "pad", "stretch", "right"])
@pytest.mark.parametrize("shape", [(8192, 4), (4, 8192), (8192, 1)])
def test_strips_take_little_memory(shape: tuple[int, int], crop: str) -> None:
    """The largest tensor made on the way, in values: a whole strip of 8192 x 4 would be 308 million of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.values = max(self.values, out.numel())
            return out

    image, mask = torch.rand(1, *shape, 3), torch.ones(1, 64, 64)
    with Largest() as largest:
        crop_image(image, 224, crop, mask=mask)
    assert largest.values < 10_000_000


def test_channels() -> None:
    grey = torch.rand(2, 24, 24, 1)
    assert torch.equal(crop_image(grey, 24), grey.expand(-1, -1, -1, 3))
    for channels in (2, 5):
        with pytest.raises(AdapterError, match=f"image has the shape .*, {channels}\\)"):
            crop_image(torch.rand(1, 8, 8, channels), 4)
