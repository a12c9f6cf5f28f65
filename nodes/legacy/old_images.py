"""Image operations with the numbers of the old nodes. Images are [B, C, H, W] here, masks [M, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    return T.center_crop(images, list(size))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing. The overshoot at edges stays."""
    planes = images[:, None] if images.ndim == 3 else images
    planes = T.resize(planes, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return planes[:, 0] if images.ndim == 3 else planes


def resize_with_pil(images: Tensor, size: tuple[int, int], filter_name: str) -> Tensor:
    """To (height, width) in 8 bits; `filter_name` is one of PIL's."""
    resample = Image.Resampling[filter_name]
    resized = [T.to_pil_image(image.cpu()).resize(size[::-1], resample=resample) for image in images]
    return torch.stack([T.pil_to_tensor(image).float() / 255 for image in resized])


def sharpen(images: Tensor, amount: float) -> Tensor:
    """AMD's contrast adaptive sharpening; 0 leaves the images as they are."""
    if amount <= 0:
        return images
    padded = F.pad(images.cpu(), (1, 1, 1, 1))
    height, width = images.shape[-2:]

    def shifted(*offsets: tuple[int, int]) -> Tensor:
        return torch.stack([padded[..., y : y + height, x : x + width] for y, x in offsets])

    centre = shifted((1, 1))
    sides, corners = shifted((0, 1), (1, 0), (1, 2), (2, 1)), shifted((0, 0), (0, 2), (2, 0), (2, 2))
    cross = torch.cat([sides, centre])
    darkest = cross.amin(0).clamp_min(0) + corners.amin(0).clamp_min(0)
    brightest = cross.amax(0).clamp_max(1) + corners.amax(0).clamp_max(1)
    amplitude = torch.sqrt(torch.minimum(darkest, 2 - brightest) / brightest)
    peak = -amplitude * (amount * (1 / 5 - 1 / 8) + 1 / 8)
    sharp = (sides.sum(0) * peak + centre[0]) / (1 + 4 * peak)
    return torch.nan_to_num(sharp).clamp(0, 1)
