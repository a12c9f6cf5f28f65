"""The kinds of adapter that can be trained: a table, and the spec of a new adapter of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which listing and checking settings does not need
    from ipadapter_core import AdapterSpec, Kind

FACE_DIM = 512  # ArcFace's embedding


@dataclass(frozen=True)
class TrainKind:
    """A kind by the name that configs use, and its `kind` and `shortcut` in an `AdapterSpec`.

    `file_suffix` follows "ip-adapter" in the names of published files; `summary` is for messages and config files.
    """

    name: str
    kind: Kind
    file_suffix: str
    summary: str
    shortcut: bool | None = None

    @cached_property
    def _published(self) -> AdapterSpec:
        from ipadapter_core import FAMILIES, new_spec

        return new_spec(self.kind, FAMILIES["sd15"][1], FAMILIES["sd15"][0])

    @property
    def takes_image(self) -> bool:
        """Whether it takes image features."""
        return self._published.image_dim is not None

    @property
    def takes_face(self) -> bool:
        """Whether it takes a face embedding."""
        return self._published.face_dim is not None

    @property
    def takes_hidden_states(self) -> bool:
        """Whether its image features are the encoder's penultimate hidden states instead of image_embeds."""
        return "penultimate_hidden_states" in self._published.feature


TRAIN_KINDS: Mapping[str, TrainKind] = {
    kind.name: kind
    for kind in (
        TrainKind("base", "base", "", "4 tokens from the image's global embedding"),
        TrainKind("plus", "plus", "-plus", "16 tokens from its patches through a resampler"),
        TrainKind("full", "full", "-full-face", "every patch as a token, through an MLP"),
        TrainKind("faceid", "faceid", "-faceid", "4 tokens from a face embedding, and a LoRA"),
        TrainKind(
            "faceid-plus",
            "faceid-plus",
            "-faceid-plus",
            "4 tokens from a face embedding and the patches of the face, and a LoRA",
            shortcut=False,
        ),
        TrainKind(
            "faceid-plusv2",
            "faceid-plus",
            "-faceid-plusv2",
            "faceid-plus with the face tokens added to the result, so that the patches' share can be set",
            shortcut=True,
        ),
        TrainKind("portrait", "portrait", "-faceid-portrait", "16 tokens from a face embedding, no LoRA"),
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
    """The spec of a new adapter in its published shape for a UNet and an image encoder.

    `image_embeds_dim`, `hidden_dim` and `image_tokens` (patches and the class token) are the encoder's;
    `num_tokens` None takes the published number. A full adapter has as many tokens as the encoder.

    Raises AdapterError for widths that do not divide into heads of 64 or fewer.
    """
    from ipadapter_core import new_spec

    image_dim = hidden_dim if kind.takes_hidden_states else image_embeds_dim
    width = cross_attention_dim if kind.kind == "faceid-plus" else None
    return new_spec(
        kind.kind,
        layer_dims,
        cross_attention_dim,
        image_dim=image_dim if kind.takes_image else None,
        num_tokens=image_tokens if kind.kind == "full" else num_tokens,
        face_dim=FACE_DIM,
        dim_head=_dim_head(width or cross_attention_dim),
        shortcut=kind.shortcut,
        encoder_id=encoder_id,
    )


def _dim_head(width: int) -> int:
    """64, as published, unless the model is so small that its width has no such head."""
    return 64 if width % 64 == 0 else width
