"""An example and a draw -> an item: what a batch holds of one picture, in the original trainer's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConfigError
from .augmentation import Address, Geometry, Randomness, Recipe, geometry, randomness
from .images import Picture, Size, cover_and_crop, open_rgb, share_of, to_tensor


@dataclass(frozen=True, eq=False)
class Encoding:
    """What preparing an example needs of a base model and of a kind of adapter; workers get this and no model."""

    tokenizers: tuple[Any, ...]  # one, or two for SDXL
    text_length: int
    image_processor: Any | None = None  # None: the kind takes no picture
    latent_scale: int = 8
    latent_channels: int = 4
    num_train_timesteps: int = 1000
    takes_face: bool = False
    face_width: int = 512

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of a picture's latents."""
        return self.latent_channels, size[1] // self.latent_scale, size[0] // self.latent_scale


def make_item(
    encoding: Encoding,
    recipe: Recipe,
    size: Size,
    address: Address,
    image: Picture,
    text: str,
    references: Sequence[Picture] = (),
    face_id_embed: Tensor | None = None,
) -> dict[str, Any]:
    """One row of a `Batch`, with `images` of the given size (width, height)."""
    drawn = randomness(recipe, address, encoding.latent_shape(size), encoding.num_train_timesteps)
    item: dict[str, Any] = {
        **picture_tensors(
            encoding, recipe, size, geometry(recipe, address), open_picture(encoding, recipe, size, image), references
        ),
        **drawn_values(drawn),
    }
    for key, tokenizer in zip(("text_input_ids", "text_input_ids_2"), encoding.tokenizers, strict=False):
        item[key] = tokenize(tokenizer, "" if drawn.drop_text else text, encoding.text_length)
    if encoding.takes_face:
        item["face_id_embed"] = face_id_embed
    return item


def open_picture(encoding: Encoding, recipe: Recipe, size: Size, picture: Picture) -> tuple[Image.Image, Size]:
    """The picture, upright, with as many pixels as targets of `size` and the image encoder can use, and the size of
    the file's picture.
    """
    return open_rgb(picture, _enough_pixels(encoding, recipe, size))


def picture_tensors(
    encoding: Encoding,
    recipe: Recipe,
    size: Size,
    where: Geometry,
    opened: tuple[Image.Image, Size],
    references: Sequence[Picture] = (),
) -> dict[str, Tensor]:
    """What a row shows: `images` of the given size (width, height), the sizes, and `clip_images` of its reference."""
    picture, (width, height) = opened
    if where.flip:
        picture = ImageOps.mirror(picture)
    cut = cover_and_crop(picture, size, where.left, where.top)
    tensors = {
        "images": to_tensor(cut.picture),
        "original_size": torch.tensor([height, width], dtype=torch.float32),
        "crop_coords_top_left": torch.tensor(cut.top_left, dtype=torch.float32),
        "target_size": torch.tensor(size[::-1], dtype=torch.float32),
    }
    if encoding.image_processor is None:
        return tensors
    if not references or where.own_reference:
        # A picture that is its own reference shows what the target shows; the encoder cuts the centre by itself.
        own = picture.crop(cut.box) if recipe.crop == "random" else picture
        return {**tensors, "clip_images": _clip_image(encoding, own, where)}
    reference, _ = open_picture(encoding, recipe, size, references[int(where.reference * len(references))])
    return {**tensors, "clip_images": reference_tensor(encoding, where, reference)}


def reference_tensor(encoding: Encoding, where: Geometry, reference: Image.Image) -> Tensor:
    """`clip_images` of a row whose reference is another picture."""
    return _clip_image(encoding, ImageOps.mirror(reference) if where.flip else reference, where)


def drawn_values(drawn: Randomness) -> dict[str, Any]:
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


def _clip_image(encoding: Encoding, reference: Image.Image, where: Geometry) -> Tensor:
    if where.reference_area < 1:
        reference = share_of(reference, where.reference_area, where.reference_left, where.reference_top)
    assert encoding.image_processor is not None
    return encoding.image_processor(images=reference, return_tensors="pt").pixel_values[0]


def _enough_pixels(encoding: Encoding, recipe: Recipe, size: Size) -> int:
    """The short side from which a picture is still scaled down to half, by target and image encoder."""
    side = max(size)
    if encoding.image_processor is not None:
        crop = encoding.image_processor.crop_size
        side = max(side, int((crop if isinstance(crop, int) else crop["height"]) / recipe.reference_crop**0.5))
    return 2 * side


def check_size(size: Size, encoding: Encoding) -> None:
    """Raises ConfigError for a picture whose latents would have a fraction of a row."""
    if size[0] % encoding.latent_scale or size[1] % encoding.latent_scale:
        raise ConfigError(
            f"Pictures of {size[0]}x{size[1]} pixels: both sides must be multiples of {encoding.latent_scale}, the "
            "pixels per latent. Change resolution or bucket_step."
        )
