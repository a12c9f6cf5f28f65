"""What an adapter is: a frozen description that builds its modules and names its encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .errors import AdapterError
from .published_encoders import CLIP_L_336, encoders_of_dim

Kind = Literal["base", "plus", "full", "faceid", "faceid-plus", "portrait"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Feature = Literal["image_embeds", "penultimate_hidden_states", "face_embeds", "face_embeds+penultimate_hidden_states"]

# Channels of the cross-attention layers in id order (down, up, mid), as in the published files.
SD15_DIMS = (320,) * 2 + (640,) * 2 + (1280,) * 2 + (1280,) * 3 + (640,) * 3 + (320,) * 3 + (1280,)
SDXL_DIMS = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10
FAMILIES: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "sd15": (768, SD15_DIMS),
    "sd2": (1024, SD15_DIMS),
    "sdxl": (2048, SDXL_DIMS),
}
FAMILY_NAMES: Mapping[str, str] = {"sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL"}

_RESAMPLER = ("resampler_dim", "depth", "heads", "dim_head")
_NEEDED: Mapping[Kind, tuple[str, ...]] = {  # the fields that a kind cannot be built without
    "base": ("image_dim",),
    "plus": ("image_dim", *_RESAMPLER),
    "full": ("image_dim",),
    "faceid": ("face_dim",),
    "faceid-plus": ("image_dim", "face_dim", *_RESAMPLER),
    "portrait": ("face_dim",),
}

# Only Kolors' resampler is as wide as its context; its encoder is ViT-L/14 at 336 pixels.
_KOLORS_DIM = 2048
KOLORS_TEXT_DIM = 4096  # channels of ChatGLM's states, which Kolors' UNet narrows with its encoder_hid_proj


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Everything about an adapter but its weights.

    `image_dim` and `face_dim` are the channels of the features that it takes. `hidden_dim` is that of the MLP (full,
    faceid*), `resampler_dim` that of the resampler (plus, faceid-plus); `depth`, `heads` and `dim_head` are the
    resampler's and None without one. `layer_dims` has the channels of each cross-attention layer in id order.
    `shortcut` is True for faceid-plus v2, False for v1 and None when unknown. `unnormalised`: the face embeddings are
    not normalised (portrait with a resampler, Kolors FaceID). `token_dim` is set where tokens have another dim than
    `cross_attention_dim`: those of Kolors FaceID pass the model's own encoder_hid_proj first. `encoder_resolution` is
    the side of the encoder's input in pixels, where it differs from the encoder's default.

    Raises AdapterError when a field that the kind needs is None.
    """

    kind: Kind
    family: str
    cross_attention_dim: int
    num_tokens: int
    image_dim: int | None
    face_dim: int | None
    hidden_dim: int | None
    resampler_dim: int | None
    depth: int | None
    heads: int | None
    dim_head: int | None
    layer_dims: tuple[int, ...]
    lora_rank: int | None = None
    shortcut: bool | None = None
    unnormalised: bool = False
    encoder_id: str | None = None
    negative: str = "zeros"
    token_dim: int | None = None
    encoder_resolution: int | None = None

    def __post_init__(self) -> None:
        missing = [name for name in _NEEDED[self.kind] if getattr(self, name) is None]
        if missing:
            raise AdapterError(
                f"The spec of a {self.kind} adapter lacks {' and '.join(missing)}. `new_spec` fills in the published "
                "defaults."
            )

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The odd ids of the cross-attention layers: 1, 3, 5, ..."""
        return tuple(range(1, 2 * len(self.layer_dims), 2))

    @property
    def feature(self) -> Feature:
        """The encoder output that `IPAdapter.encode` takes; faceid-plus takes two, in this order."""
        features: dict[Kind, Feature] = {
            "base": "image_embeds",
            "plus": "penultimate_hidden_states",
            "full": "penultimate_hidden_states",
            "faceid": "face_embeds",
            "portrait": "face_embeds",
            "faceid-plus": "face_embeds+penultimate_hidden_states",
        }
        return features[self.kind]

    @property
    def encoder(self) -> str:
        """The encoder to use: from the file's metadata, else guessed from the dims of the features."""
        if self.encoder_id:
            return self.encoder_id
        names: list[str] = []
        if self.face_dim is not None:
            embedding = "raw embedding" if self.unnormalised else "normed_embedding"
            names.append(f"InsightFace ArcFace ({embedding}, {self.face_dim})")
        if self.image_dim is not None:
            names.append(self._image_encoder(self.image_dim))
        return " and ".join(names)

    def _image_encoder(self, dim: int) -> str:
        if self.is_kolors:
            return CLIP_L_336.name
        base = self.kind == "base"
        names = dict.fromkeys(encoder.name for encoder in encoders_of_dim(dim, embeds=base))
        if names:
            return " or ".join(names)
        if base and encoders_of_dim(dim, embeds=False):
            return "SigLIP with its pooling head, which ComfyUI does not load"
        return f"an unknown image encoder of width {dim}"

    @property
    def is_kolors(self) -> bool:
        """Whether it is made for Kolors, whose UNet has SDXL's shapes but another text encoder."""
        plus = self.resampler_dim == self.cross_attention_dim == _KOLORS_DIM
        return self.image_dim == 1024 and (plus or self.token_dim == KOLORS_TEXT_DIM)

    @property
    def lookalike(self) -> str:
        """A sentence on another kind of file of the same shapes; "" for most."""
        if self.kind == "portrait" and self.unnormalised and self.family == "sdxl":
            return (
                "InstantID's ip-adapter.bin has the same shapes: it needs InstantID's own ControlNet beside it, so use "
                "InstantID's nodes for that file."
            )
        return ""

    @property
    def family_name(self) -> str:
        """For messages: "SDXL", or the cross_attention_dim of an unknown family."""
        if self.is_kolors:
            return "Kolors"
        return FAMILY_NAMES.get(self.family, f"a model of context {self.cross_attention_dim}")

    def describe(self) -> str:
        """One line for people, such as "plus adapter for SDXL: 16 tokens of 2048 from ..."."""
        parts = [f"{self.num_tokens} tokens of {self.cross_attention_dim} from {self.feature} ({self.encoder})"]
        if self.depth is not None:
            parts.append(f"resampler of depth {self.depth} with {self.heads} heads of {self.dim_head}")
        parts.append(f"{len(self.layer_dims)} layers")
        if self.lora_rank is not None:
            parts.append(f"LoRA of rank {self.lora_rank}")
        if self.kind == "faceid-plus":
            parts.append({True: "v2 (shortcut)", False: "v1", None: "v1 or v2 unknown"}[self.shortcut])
        return f"{self.kind} adapter for {self.family_name}: {', '.join(parts)}" + f". {self.lookalike}".rstrip(". ")

    def __str__(self) -> str:
        return self.describe()


def family_of(cross_attention_dim: int, layer_dims: Sequence[int]) -> str:
    """ "sd15", "sd2" or "sdxl" when cross_attention_dim and all layer dims match, else
    "context-<cross_attention_dim>".
    """
    for family, (context, dims) in FAMILIES.items():
        if context == cross_attention_dim and dims == tuple(layer_dims):
            return family
    return f"context-{cross_attention_dim}"


def new_spec(
    kind: Kind,
    layer_dims: Sequence[int],
    cross_attention_dim: int,
    *,
    image_dim: int | None = None,
    num_tokens: int | None = None,
    face_dim: int = 512,
    depth: int = 4,
    dim_head: int = 64,
    resampler_dim: int | None = None,
    lora_rank: int | None = 128,
    shortcut: bool | None = None,
    encoder_id: str | None = None,
) -> AdapterSpec:
    """The spec of a new adapter, with the published defaults for what is left out.

    `image_dim` defaults to that of ViT-H/14: 1024 for base, 1280 for the others. `resampler_dim` defaults to 1280 for
    SDXL and else to `cross_attention_dim`, which FaceID-plus always uses; the resampler has resampler_dim / dim_head
    heads. `lora_rank` is used by faceid and faceid-plus only.

    Raises AdapterError for an unknown kind, or a resampler_dim that does not divide into heads.
    """
    if kind not in KINDS:
        raise AdapterError(f"Unknown adapter kind {kind!r}. Use one of: {', '.join(KINDS)}.")
    family = family_of(cross_attention_dim, layer_dims)
    image, face, resampled = (name in _NEEDED[kind] for name in ("image_dim", "face_dim", "depth"))
    default_dim = 1280 if family == "sdxl" and kind == "plus" else cross_attention_dim
    dim = (resampler_dim or default_dim) if kind == "plus" else cross_attention_dim
    if resampled and dim % dim_head:
        raise AdapterError(f"A resampler of width {dim} does not divide into heads of {dim_head}. Change dim_head.")
    image_dim = image_dim or (1024 if kind == "base" else 1280)
    counts: dict[Kind, int] = {
        "base": 4,
        "plus": 16,
        "full": 257,
        "faceid": 4,
        "faceid-plus": 4,
        "portrait": 16,
    }
    hidden: dict[Kind, int] = {
        "full": image_dim,
        **dict.fromkeys(("faceid", "faceid-plus", "portrait"), 2 * face_dim),
    }
    return AdapterSpec(
        kind=kind,
        family=family,
        cross_attention_dim=cross_attention_dim,
        num_tokens=num_tokens or counts[kind],
        image_dim=image_dim if image else None,
        face_dim=face_dim if face else None,
        hidden_dim=hidden.get(kind),
        resampler_dim=dim if resampled else None,
        depth=depth if resampled else None,
        heads=dim // dim_head if resampled else None,
        dim_head=dim_head if resampled else None,
        layer_dims=tuple(layer_dims),
        lora_rank=lora_rank if kind in ("faceid", "faceid-plus") else None,
        shortcut=shortcut if kind == "faceid-plus" else None,
        encoder_id=encoder_id,
    )


def with_shortcut(spec: AdapterSpec, shortcut: bool | None) -> AdapterSpec:
    """The spec with the shortcut that the user chose; None leaves it as it is."""
    if shortcut is None:
        return spec
    if spec.kind != "faceid-plus":
        raise AdapterError(
            f"shortcut={shortcut} is for faceid-plus adapters; this is a {spec.kind} adapter. Leave it out."
        )
    return replace(spec, shortcut=shortcut)
