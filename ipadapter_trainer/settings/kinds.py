"""The kinds of adapter that can be trained, and the spec of a new adapter of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ipadapter_core import AdapterSpec, Kind, new_spec

FACE_DIM = 512  # ArcFace's embedding


@dataclass(frozen=True)
class TrainKind:
    """A value of the setting `kind`. `kind` and `shortcut` are those of the adapter's spec; `summary` is for help
    texts.
    """

    name: str
    kind: Kind
    summary: str
    shortcut: bool | None = None

    @property
    def takes_image(self) -> bool:
        """Whether it uses the image encoder."""
        return self.kind not in ("faceid", "portrait")

    @property
    def takes_face(self) -> bool:
        """Whether it takes a face embedding."""
        return self.kind in ("faceid", "faceid-plus", "portrait")

    @property
    def takes_hidden_states(self) -> bool:
        """Whether it takes the penultimate hidden states of the image encoder instead of its embedding."""
        return self.kind in ("plus", "full", "faceid-plus")


TRAIN_KINDS: Mapping[str, TrainKind] = {
    kind.name: kind
    for kind in (
        TrainKind("base", "base", "4 tokens from the image's global embedding"),
        TrainKind("plus", "plus", "16 tokens from its patches through a resampler"),
        TrainKind("full", "full", "one token per patch, through an MLP"),
        TrainKind("faceid", "faceid", "4 tokens from a face embedding, and a LoRA"),
        TrainKind(
            "faceid-plus",
            "faceid-plus",
            "4 tokens from a face embedding and the patches of the face, and a LoRA",
            shortcut=False,
        ),
        TrainKind(
            "faceid-plusv2",
            "faceid-plus",
            "faceid-plus with a shortcut from the face tokens to the output, so that the patches can be weighted",
            shortcut=True,
        ),
        TrainKind("portrait", "portrait", "16 tokens from a face embedding, no LoRA"),
    )
}


def spec_for(
    kind: TrainKind,
    layer_dims: Sequence[int],
    cross_attention_dim: int,
    *,
    image_embeds_dim: int | None,
    hidden_dim: int | None,
    image_tokens: int | None,
    num_tokens: int | None = None,
    encoder_id: str | None = None,
) -> AdapterSpec:
    """The spec of a new adapter for a UNet and an image encoder, with the published architecture.

    `image_embeds_dim`, `hidden_dim` and `image_tokens` (patches and class token) describe the image encoder.
    `num_tokens` defaults to the published number; a full adapter has one token per image token.

    Raises AdapterError for dimensions that do not divide into heads.
    """
    image_dim = hidden_dim if kind.takes_hidden_states else image_embeds_dim
    return new_spec(
        kind.kind,
        layer_dims,
        cross_attention_dim,
        image_dim=image_dim if kind.takes_image else None,
        num_tokens=image_tokens if kind.kind == "full" else num_tokens,
        face_dim=FACE_DIM,
        dim_head=64 if cross_attention_dim % 64 == 0 else cross_attention_dim,  # tiny models have no head of 64
        shortcut=kind.shortcut,
        encoder_id=encoder_id,
    )
