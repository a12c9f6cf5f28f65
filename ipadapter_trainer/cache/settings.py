"""What a feature cache holds, and what must be the same in a training that reads it; and how large it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..data.images import Size
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .files import channels_per_scale

ImageFeatures = Literal["float16", "int8", "none"]


@dataclass(frozen=True)
class Settings:
    """What must be the same in a cache and in a training that reads it."""

    data: str  # examples.fingerprint
    examples: int
    vae: str
    text_encoders: str
    image_encoder: str | None
    image_feature: Literal["image_embeds", "penultimate_hidden_states"] | None
    cache_image_features: ImageFeatures
    own_references: bool  # rows that name a reference also have the features of their own image
    resolution: int
    buckets: bool
    bucket_step: int | None
    crop: str
    flip: bool
    reference_crop: float
    cache_variants: int
    seed: int | None  # of the crops; None where none is drawn

    @property
    def latent_variants(self) -> int:
        """Variants of an image's latents."""
        return self._variants(self.crop == "random")

    @property
    def own_variants(self) -> int:
        """Variants of the image features of an image that is its own reference."""
        return self._variants(self.crop == "random" or self.reference_crop < 1)

    @property
    def reference_variants(self) -> int:
        """Variants of the image features of another image that is the reference."""
        return self._variants(self.reference_crop < 1)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """Clauses that name what is otherwise in the settings of a cache that was found."""
        now = asdict(self)
        return [
            f"{key} was {found.get(key)!r} and is now {value!r}"
            for key, value in now.items()
            if found.get(key) != value
        ]

    def _variants(self, random: bool) -> int:
        return (self.cache_variants if random else 1) * (2 if self.flip else 1)


def settings_of(
    config: TrainConfig, base_model: BaseModel, data_hash: str, examples: int, *, any_reference: bool
) -> Settings:
    """The settings of a cache that fits a training; `any_reference` when a row names another image as reference."""
    kind = config.train_kind
    feature = "penultimate_hidden_states" if kind.takes_hidden_states else "image_embeds"
    # An embedding is small, so there is nothing to save; without image encoder there are none.
    stored: ImageFeatures = config.cache_image_features if kind.takes_hidden_states else "float16"
    encoded = kind.takes_image and stored != "none"
    random = config.crop == "random" or (encoded and config.reference_crop < 1)
    return Settings(
        data=data_hash,
        examples=examples,
        vae=base_model.vae_fingerprint(),
        text_encoders=base_model.text_fingerprint(),
        image_encoder=base_model.encoder_fingerprint() if encoded else None,
        image_feature=feature if encoded else None,
        cache_image_features=stored if encoded else "none",
        own_references=encoded and any_reference and config.self_reference > 0,
        resolution=config.resolution,
        buckets=config.buckets,
        bucket_step=config.bucket_step if config.buckets else None,
        crop=config.crop,
        flip=config.flip,
        reference_crop=config.reference_crop if encoded else 1.0,
        cache_variants=config.cache_variants if random else 1,
        seed=config.seed if random else None,
    )


class RowBytes(NamedTuple):
    """Bytes of a row of each table: a distinct caption, a distinct other reference, an image of the square bucket;
    and of the features that an image has in addition when it is its own reference.
    """

    text: int
    reference: int
    image: int
    own: int


def row_bytes(settings: Settings, base_model: BaseModel, size: Size | None = None, dtype_bytes: int = 2) -> RowBytes:
    """What a row takes on disk; `size` (width, height) is a bucket's."""
    width, height = size or (settings.resolution, settings.resolution)
    latents = base_model.latent_channels * (height // base_model.latent_scale) * (width // base_model.latent_scale)
    conditions = base_model.meta_conditions(1)
    text = base_model.text_length * base_model.sites[0].cross_attention_dim
    text += 0 if conditions is None else conditions["text_embeds"].shape[-1]
    feature = 0
    if settings.image_feature == "image_embeds":
        feature = base_model.image_dim * dtype_bytes
    elif settings.image_feature is not None:
        channels = base_model.hidden_dim
        scales = 2 * (channels // channels_per_scale(channels))
        each = channels + scales if settings.cache_image_features == "int8" else channels * dtype_bytes
        feature = base_model.image_tokens * each
    return RowBytes(
        text=text * dtype_bytes,
        reference=settings.reference_variants * feature,
        image=settings.latent_variants * (2 * latents * dtype_bytes + 24) + 4,
        own=settings.own_variants * feature,
    )


def cache_size(
    config: TrainConfig,
    base_model: BaseModel,
    *,
    images: int,
    captions: int,
    references: int = 0,
    own: int | None = None,
) -> int:
    """Bytes of a cache of so many images, distinct captions (the empty one included), distinct images that are
    others' references, and images that are their own reference (None: all).

    Nothing is loaded. Buckets count as squares; their areas differ by a few percent.
    """
    settings = settings_of(config, base_model, "", images, any_reference=references > 0)
    row = row_bytes(settings, base_model)
    own = images if own is None or settings.own_references else own
    return captions * row.text + references * row.reference + images * row.image + own * row.own
