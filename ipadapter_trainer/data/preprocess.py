"""An example -> one row of a batch: the image is opened, cropped and flipped, the caption tokenized, noise drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConfigError
from .augmentation import Augmentation, CropParams, NoiseParams, RandomKey, crop_params, noise_params
from .examples import Example
from .face_embeds import face_id_embed
from .images import ImageSource, Size, crop_to_area, open_rgb, resize_and_crop, to_tensor

Source = TypeVar("Source", bound=ImageSource)


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """What preprocessing needs of the base model and of the kind of adapter. Workers get this instead of a model."""

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
    preprocessor: Preprocessor, augmentation: Augmentation, size: Size, key: RandomKey, example: Example
) -> dict[str, Any]:
    """One row of a `Batch`, with `images` of the given size (width, height).

    Raises what Pillow raises for an image that cannot be read, DataError for a missing or bad face embedding.
    """
    noise = noise_params(augmentation, key, preprocessor.latent_shape(size), preprocessor.num_train_timesteps)
    crop = crop_params(augmentation, key)
    opened = open_image(preprocessor, augmentation, size, example.image)
    item: dict[str, Any] = {
        **image_tensors(preprocessor, augmentation, size, crop, opened, example.references),
        **noise_tensors(noise),
    }
    text = "" if noise.drop_text else example.text
    for name, ids in zip(
        ("text_input_ids", "text_input_ids_2"),
        tokenize(preprocessor.tokenizers, [text], preprocessor.text_length),
        strict=False,
    ):
        item[name] = ids[0]
    if preprocessor.takes_face:
        item["face_id_embed"] = face_id_embed(example, preprocessor.face_dim)
    return item


def open_image(
    preprocessor: Preprocessor, augmentation: Augmentation, size: Size, image: ImageSource
) -> tuple[Image.Image, Size]:
    """The upright RGB image, and the size of the image in the file.

    A large JPEG is decoded at a fraction of its size, with a short side of at least twice what the target `size` and
    the image encoder need.
    """
    side = max(size)
    if preprocessor.image_processor is not None:
        crop_size = preprocessor.image_processor.crop_size
        encoder_side = crop_size if isinstance(crop_size, int) else crop_size["height"]
        side = max(side, int(encoder_side / augmentation.reference_crop**0.5))
    return open_rgb(image, 2 * side)


def image_tensors(
    preprocessor: Preprocessor,
    augmentation: Augmentation,
    size: Size,
    crop: CropParams,
    opened: tuple[Image.Image, Size],
    references: Sequence[ImageSource] = (),
) -> dict[str, Tensor]:
    """`images` of the given size (width, height), SDXL's sizes and crop, and `clip_images` of the reference."""
    image, (width, height) = opened
    if crop.flip:
        image = ImageOps.mirror(image)
    cropped = resize_and_crop(image, size, crop.left, crop.top)
    tensors = {
        "images": to_tensor(cropped.image),
        "original_size": torch.tensor([height, width], dtype=torch.float32),
        "crop_coords_top_left": torch.tensor(cropped.top_left, dtype=torch.float32),
        "target_size": torch.tensor(size[::-1], dtype=torch.float32),
    }
    if preprocessor.image_processor is None:
        return tensors
    chosen = choose_reference(crop, references)
    if chosen is None:
        # The reference shows what the target shows; the image processor cuts out the centre itself.
        own = image.crop(cropped.box) if augmentation.crop == "random" else image
        return {**tensors, "clip_images": _clip_image(preprocessor, crop, own)}
    reference, _ = open_image(preprocessor, augmentation, size, chosen)
    return {**tensors, "clip_images": reference_tensor(preprocessor, crop, reference)}


def choose_reference(crop: CropParams, references: Sequence[Source]) -> Source | None:
    """One of the references; None if the image is its own."""
    return None if crop.own_reference or not references else references[int(crop.reference * len(references))]


def reference_tensor(preprocessor: Preprocessor, crop: CropParams, reference: Image.Image) -> Tensor:
    """`clip_images` of a row whose reference is another image."""
    return _clip_image(preprocessor, crop, ImageOps.mirror(reference) if crop.flip else reference)


def noise_tensors(noise: NoiseParams) -> dict[str, Any]:
    """Dropout, noise and timestep by their names in a `Batch`."""
    return {
        "drop_image_embeds": int(noise.drop_image),
        "noise": noise.noise,
        "posterior_noise": noise.posterior_noise,
        "timesteps": noise.timestep,
    }


def tokenize(tokenizers: Sequence[Any], texts: Sequence[str], length: int) -> tuple[Tensor, ...]:
    """Texts -> token ids, int64 [B, length], by each tokenizer; padded or cut."""
    return tuple(
        tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    )


def check_image_size(size: Size, preprocessor: Preprocessor) -> None:
    """Raises ConfigError for a size that is no multiple of the pixels per latent."""
    if size[0] % preprocessor.latent_scale or size[1] % preprocessor.latent_scale:
        raise ConfigError(
            f"Images of {size[0]}x{size[1]} pixels: both sides must be multiples of {preprocessor.latent_scale}, the "
            "pixels per latent. Change resolution or bucket_step."
        )


def _clip_image(preprocessor: Preprocessor, crop: CropParams, reference: Image.Image) -> Tensor:
    if crop.reference_area < 1:
        reference = crop_to_area(reference, crop.reference_area, crop.reference_left, crop.reference_top)
    assert preprocessor.image_processor is not None
    return preprocessor.image_processor(images=reference, return_tensors="pt").pixel_values[0]
