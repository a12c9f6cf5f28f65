"""An example and a draw -> an item: what a batch holds of one image, in the original trainer's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConfigError
from .augmentation import Augmentation, CropParams, NoiseParams, RandomKey, crop_params, noise_params
from .images import ImageSource, Size, crop_to_area, open_rgb, resize_and_crop, to_tensor


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """What preparing an example needs of a base model and of a kind of adapter; workers get this and no model."""

    tokenizers: tuple[Any, ...]  # one, or two for SDXL
    text_length: int
    image_processor: Any | None = None  # None: the kind takes no image
    latent_scale: int = 8
    latent_channels: int = 4
    num_train_timesteps: int = 1000
    takes_face: bool = False
    face_dim: int = 512

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of an image's latents."""
        return self.latent_channels, size[1] // self.latent_scale, size[0] // self.latent_scale


def preprocess(
    preprocessor: Preprocessor,
    augmentation: Augmentation,
    size: Size,
    address: RandomKey,
    image: ImageSource,
    text: str,
    references: Sequence[ImageSource] = (),
    face_id_embed: Tensor | None = None,
) -> dict[str, Any]:
    """One row of a `Batch`, with `images` of the given size (width, height)."""
    drawn = noise_params(augmentation, address, preprocessor.latent_shape(size), preprocessor.num_train_timesteps)
    item: dict[str, Any] = {
        **image_tensors(
            preprocessor,
            augmentation,
            size,
            crop_params(augmentation, address),
            open_image(preprocessor, augmentation, size, image),
            references,
        ),
        **noise_tensors(drawn),
    }
    for key, tokenizer in zip(("text_input_ids", "text_input_ids_2"), preprocessor.tokenizers, strict=False):
        item[key] = tokenize(tokenizer, "" if drawn.drop_text else text, preprocessor.text_length)
    if preprocessor.takes_face:
        item["face_id_embed"] = face_id_embed
    return item


def open_image(
    preprocessor: Preprocessor, augmentation: Augmentation, size: Size, image: ImageSource
) -> tuple[Image.Image, Size]:
    """The image, upright, with as many pixels as targets of `size` and the image encoder can use, and the size of
    the file's image.
    """
    return open_rgb(image, _enough_pixels(preprocessor, augmentation, size))


def image_tensors(
    preprocessor: Preprocessor,
    augmentation: Augmentation,
    size: Size,
    where: CropParams,
    opened: tuple[Image.Image, Size],
    references: Sequence[ImageSource] = (),
) -> dict[str, Tensor]:
    """What a row shows: `images` of the given size (width, height), the sizes, and `clip_images` of its reference."""
    image, (width, height) = opened
    if where.flip:
        image = ImageOps.mirror(image)
    cut = resize_and_crop(image, size, where.left, where.top)
    tensors = {
        "images": to_tensor(cut.image),
        "original_size": torch.tensor([height, width], dtype=torch.float32),
        "crop_coords_top_left": torch.tensor(cut.top_left, dtype=torch.float32),
        "target_size": torch.tensor(size[::-1], dtype=torch.float32),
    }
    if preprocessor.image_processor is None:
        return tensors
    if not references or where.own_reference:
        # An image that is its own reference shows what the target shows; the encoder cuts the centre by itself.
        own = image.crop(cut.box) if augmentation.crop == "random" else image
        return {**tensors, "clip_images": _clip_image(preprocessor, own, where)}
    reference, _ = open_image(preprocessor, augmentation, size, references[int(where.reference * len(references))])
    return {**tensors, "clip_images": reference_tensor(preprocessor, where, reference)}


def reference_tensor(preprocessor: Preprocessor, where: CropParams, reference: Image.Image) -> Tensor:
    """`clip_images` of a row whose reference is another image."""
    return _clip_image(preprocessor, ImageOps.mirror(reference) if where.flip else reference, where)


def noise_tensors(drawn: NoiseParams) -> dict[str, Any]:
    """What a row draws, by the names of a `Batch`."""
    return {
        "drop_image_embeds": int(drawn.drop_image),
        "noise": drawn.noise,
        "posterior_noise": drawn.posterior_noise,
        "timesteps": drawn.timestep,
    }


def tokenize(tokenizer: Any, text: str, length: int) -> Tensor:
    """Token ids int64 [L], padded or cut."""
    return tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids[0]


def _clip_image(preprocessor: Preprocessor, reference: Image.Image, where: CropParams) -> Tensor:
    if where.reference_area < 1:
        reference = crop_to_area(reference, where.reference_area, where.reference_left, where.reference_top)
    assert preprocessor.image_processor is not None
    return preprocessor.image_processor(images=reference, return_tensors="pt").pixel_values[0]


def _enough_pixels(preprocessor: Preprocessor, augmentation: Augmentation, size: Size) -> int:
    """The short side from which an image is still scaled down to half, by target and image encoder."""
    side = max(size)
    if preprocessor.image_processor is not None:
        crop = preprocessor.image_processor.crop_size
        side = max(side, int((crop if isinstance(crop, int) else crop["height"]) / augmentation.reference_crop**0.5))
    return 2 * side


def check_image_size(size: Size, preprocessor: Preprocessor) -> None:
    """Raises ConfigError for an image whose latents would have a fraction of a row."""
    if size[0] % preprocessor.latent_scale or size[1] % preprocessor.latent_scale:
        raise ConfigError(
            f"Images of {size[0]}x{size[1]} pixels: both sides must be multiples of {preprocessor.latent_scale}, the "
            "pixels per latent. Change resolution or bucket_step."
        )
