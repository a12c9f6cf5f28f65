"""CLIP's preprocessing of images for the image encoder."""

from __future__ import annotations

from typing import Any

from PIL import Image

try:  # the name without torchvision since transformers 5; before, CLIPImageProcessor was this class
    from transformers import CLIPImageProcessorPil as _Processor
except ImportError:
    from transformers import CLIPImageProcessor as _Processor

_STRIP = 8  # an image that is so many times longer than wide


class CLIPImageProcessor(_Processor):  # pyright: ignore[reportGeneralTypeIssues] -- a class in either version
    """transformers' processor, which scales the short side first and crops then: a strip of 8192 x 4 pixels would
    become one of 458,752 x 224. So strips are cropped to their middle before they are scaled.
    """

    def preprocess(self, images: Any, *arguments: Any, **options: Any) -> Any:
        """See transformers."""
        if self.do_center_crop and isinstance(images, Image.Image):
            images = _middle(images)
        elif self.do_center_crop and isinstance(images, list):
            images = [_middle(image) if isinstance(image, Image.Image) else image for image in images]
        return super().preprocess(images, *arguments, **options)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a strip: its centre square, and a margin for the filter of the scaling."""
    short, long = sorted(image.size)
    if long <= _STRIP * short:
        return image
    kept = 2 * short + long % 2  # so that the centre stays where it is
    start = (long - kept) // 2
    box = (start, 0, start + kept, short) if image.width == long else (0, start, short, start + kept)
    return image.crop(box)
