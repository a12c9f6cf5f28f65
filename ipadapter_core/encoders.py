"""The image encoder (CLIP vision) in a file, and the one that an adapter needs: by tensors, never by file name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .assets import is_for_emoji
from .errors import AdapterError
from .published_encoders import (
    CLIP_L,
    CLIP_L_336,
    PUBLISHED_ENCODERS,
    EncoderFamily,
    PublishedEncoder,
    encoders_of_dim,
    families_named,
)
from .spec import AdapterSpec
from .tensors import open_tensors

EXPECTED_ENCODER = "an image encoder (CLIP vision), .safetensors or PyTorch"

Shapes = Mapping[str, tuple[int, ...]]

_CLIP = "vision_model.embeddings."
_LAYER = re.compile(r"^(?:vision_model\.encoder\.layers|visual\.transformer\.resblocks|encoder\.layer|layer)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """An image encoder, from the shapes of its tensors.

    `hidden_dim` and `embeds_dim` are the channels of its hidden states and image_embeds (None: no image_embeds).
    `num_tokens` counts patches and class token: 257 for ViT-H/14 at 224 pixels, None when it depends on the image size.
    `patch` is the side of a patch in pixels. 0 is unknown for `layers` and `patch`.
    """

    hidden_dim: int
    embeds_dim: int | None
    num_tokens: int | None
    family: EncoderFamily = "CLIP"
    layers: int = 0
    patch: int = 0

    @property
    def published(self) -> PublishedEncoder | None:
        """The published encoder of this shape."""
        for encoder in PUBLISHED_ENCODERS:
            same = (encoder.family, encoder.hidden_dim, encoder.num_tokens) == (
                self.family,
                self.hidden_dim,
                self.num_tokens,
            )
            if same and self.layers in (0, encoder.layers):
                return encoder
        return None

    def describe(self) -> str:
        """For messages: "CLIP ViT-H/14: hidden states of 1280, image_embeds of 1024, 257 tokens"."""
        embeds = "no image_embeds" if self.embeds_dim is None else f"image_embeds of {self.embeds_dim}"
        tokens = "tokens by the size of the image" if self.num_tokens is None else f"{self.num_tokens} tokens"
        published = self.published
        name = f"{self.family}, {self.layers} layers" if published is None else published.name
        return f"{name}: hidden states of {self.hidden_dim}, {embeds}, {tokens}"


def encoder_from_shapes(shapes: Shapes) -> ImageEncoder | None:
    """The encoder with tensors of these names and shapes; None when it is no CLIP vision model."""
    numbers = [int(match.group(1)) for match in map(_LAYER.match, shapes) if match]
    layers = max(numbers, default=-1) + 1
    if f"{_CLIP}position_embedding.weight" in shapes:
        return _transformers_encoder(shapes, layers)
    if "visual.class_embedding" in shapes and "visual.positional_embedding" in shapes:  # as OpenAI names them
        projection = shapes.get("visual.proj")
        return ImageEncoder(
            hidden_dim=shapes["visual.class_embedding"][-1],
            embeds_dim=None if projection is None else projection[1],
            num_tokens=shapes["visual.positional_embedding"][-2],
            layers=layers,
            patch=shapes.get("visual.conv1.weight", (0,))[-1],
        )
    return _dino_encoder(shapes, layers) if "embeddings.cls_token" in shapes else None


def _transformers_encoder(shapes: Shapes, layers: int) -> ImageEncoder:
    """CLIP, which has a class token, or SigLIP."""
    position = shapes[f"{_CLIP}position_embedding.weight"]
    patch = shapes.get(f"{_CLIP}patch_embedding.weight", (0,))
    class_token = shapes.get(f"{_CLIP}class_embedding")
    if class_token is not None:
        projection = shapes.get("visual_projection.weight")
        embeds = None if projection is None else projection[0]
        return ImageEncoder(class_token[-1], embeds, position[-2], "CLIP", layers, patch[-1])
    if len(patch) == 2:  # NaFlex cuts the patches itself: a Linear, not a convolution
        return ImageEncoder(position[-1], None, position[-2], "SigLIP2", layers, math.isqrt(patch[-1] // 3))
    return ImageEncoder(position[-1], None, position[-2], "SigLIP", layers, patch[-1])


def _dino_encoder(shapes: Shapes, layers: int) -> ImageEncoder | None:
    dim = shapes["embeddings.cls_token"][-1]
    if "embeddings.register_tokens" in shapes and "layer.0.attention.o_proj.bias" in shapes:
        return ImageEncoder(dim, dim, None, "DINOv3", layers, shapes["embeddings.patch_embeddings.weight"][-1])
    if "encoder.layer.0.layer_scale1.lambda1" not in shapes:
        return None
    tokens = shapes["embeddings.position_embeddings"][-2]
    return ImageEncoder(dim, dim, tokens, "DINOv2", layers, shapes["embeddings.patch_embeddings.projection.weight"][-1])


def read_encoder(path: str | os.PathLike[str]) -> ImageEncoder | None:
    """The encoder in a .safetensors or PyTorch file, by its names and shapes; None for another model or an unreadable
    file.
    """
    try:
        return open_encoder(Path(path))
    except (AdapterError, OSError):
        return None


def open_encoder(path: Path) -> ImageEncoder | None:
    """`read_encoder`, but raises AdapterError or OSError for a file that cannot be read."""
    infos = open_tensors(path, EXPECTED_ENCODER).infos
    try:
        return encoder_from_shapes({name.removeprefix("state_dict."): info.shape for name, info in infos.items()})
    except (IndexError, KeyError):  # tensors of these names with fewer axes, or without the others
        return None


def encoder_fits(spec: AdapterSpec, encoder: ImageEncoder) -> bool:
    """Whether an encoder has the features that an adapter takes, and the architecture that it was trained on.

    Several encoders share a dim: the file's metadata decides, else CLIP, as in the published adapters.
    """
    dim = encoder.embeds_dim if spec.kind == "base" else encoder.hidden_dim
    if dim is None or dim != spec.image_dim:
        return False
    if spec.kind == "full" and spec.num_tokens != _tokens_at(encoder, spec.encoder_resolution):
        return False
    if spec.is_kolors:
        return encoder.published == CLIP_L_336
    families = families_named(spec.encoder_id)
    if families:
        return encoder.family in families
    known = encoders_of_dim(dim, embeds=spec.kind == "base")
    if not known:
        return encoder.family == "CLIP"  # of no published encoder: a custom one
    if CLIP_L in known:  # DINOv2-L has the same dim: only the metadata can ask for it
        known = [CLIP_L]
    return encoder.published in known or (spec.kind == "full" and encoder.family == "CLIP")


def _tokens_at(encoder: ImageEncoder, resolution: int | None) -> int | None:
    if resolution is None or not encoder.patch or encoder.family != "CLIP":
        return encoder.num_tokens
    return 1 + (resolution // encoder.patch) ** 2


def find_encoder(
    spec: AdapterSpec,
    files: Iterable[str | os.PathLike[str]],
    *,
    name: str = "The adapter",
    folder: str = "",
    open_file: Callable[[Path], ImageEncoder | None] = open_encoder,
) -> Path:
    """The first of `files`, in order, that holds the image encoder of this adapter.

    `name` is the adapter's and `folder` where encoders belong, both for the message.

    Raises AdapterError when no file fits, or two different encoders do.
    """
    seen: list[str] = []
    fitting: dict[Path, ImageEncoder] = {}
    for file in map(Path, files):
        try:
            encoder = open_file(file)
        except (AdapterError, OSError) as error:
            reason = re.split(r"; expected| \(|\. ", str(error).removeprefix(f"{file}: "))[0]  # without the advice
            seen.append(f"{file.name} ({reason})")
            continue
        if encoder is not None and encoder_fits(spec, encoder):
            fitting[file] = encoder
        else:
            seen.append(f"{file.name} ({encoder.describe() if encoder else 'not a CLIP vision model'})")
    if len({(encoder.family, encoder.num_tokens) for encoder in fitting.values()}) > 1:
        listed = "; ".join(f"{file.name} ({encoder.describe()})" for file, encoder in fitting.items())
        raise AdapterError(
            f"{name} takes {needed_features(spec)}, and several image encoders make them: {listed}. Choose the one "
            "that it was trained with in clip_vision_name."
        )
    if fitting:
        return next(iter(fitting))
    found = f"Looked at: {'; '.join(seen)}" if seen else "The folder holds no file"
    raise AdapterError(
        f"No image encoder for {name}. It needs {needed_features(spec)} ({spec.encoder}). {found}. "
        f"{encoder_advice(spec, folder)}"
    )


def needed_features(spec: AdapterSpec) -> str:
    """For messages: "image_embeds of 1024"."""
    tokens = f", {spec.num_tokens} tokens" if spec.kind == "full" else ""
    return f"{'image_embeds' if spec.kind == 'base' else 'hidden states'} of {spec.image_dim}{tokens}"


def encoder_advice(spec: AdapterSpec, folder: str = "") -> str:
    """A sentence: which published file holds the encoder of this adapter, and the folder to put it into."""
    if is_for_emoji(spec):
        return (
            "The adapter was trained on the bundled demo model: choose it in Load IP Adapter Demo, which has its image "
            "encoder."
        )
    named = families_named(spec.encoder_id)
    known = encoders_of_dim(spec.image_dim or 0, embeds=spec.kind == "base")
    if named:
        known = [encoder for encoder in known if encoder.family in named]
    if spec.is_kolors:
        known = [CLIP_L_336]
    download = known[0].download if known else ""
    download = download or f"the image encoder that the adapter was trained with ({spec.encoder})"
    return f"Download {download}, and put it into {folder or 'models/clip_vision'}."
