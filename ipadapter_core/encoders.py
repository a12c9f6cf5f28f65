"""Which image encoder (CLIP vision) a file holds and which one an adapter needs: by tensor shapes, never by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import AdapterError
from .spec import AdapterSpec
from .tensors import open_tensors

EXPECTED_ENCODER = "an image encoder (CLIP vision), .safetensors or PyTorch"

# (class embedding, position embedding, projection, the projection's output axis) in the two published layouts.
_LAYOUTS = (
    (
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "visual_projection.weight",
        0,
    ),
    ("visual.class_embedding", "visual.positional_embedding", "visual.proj", 1),
)
_DOWNLOADS = {
    1280: (
        "CLIP ViT-H/14: https://huggingface.co/h94/IP-Adapter, models/image_encoder/model.safetensors, saved as "
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    ),
    1664: (
        "OpenCLIP ViT-bigG/14: https://huggingface.co/h94/IP-Adapter, sdxl_models/image_encoder/model.safetensors, "
        "saved as CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"
    ),
    1024: "CLIP ViT-L/14: https://huggingface.co/openai/clip-vit-large-patch14, model.safetensors",
}
# The hidden width of the encoder whose image_embeds have this width.
_HIDDEN_OF_EMBEDS = {1024: 1280, 1280: 1664, 768: 1024}

# Tokens of the encoders that published plus adapters were trained with: ViT-L/14, ViT-H/14 and ViT-bigG/14 at 224
# pixels. The same models at a higher resolution have the same widths.
_PUBLISHED_TOKENS = {1024: 257, 1280: 257, 1664: 257}
_KOLORS_TOKENS = 577  # ViT-L/14 at 336 pixels


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """The shape of an image encoder: channels of its hidden states and of its image_embeds (None: without a
    projection), and its tokens (patches and the class token; 257 for ViT-H/14 at 224 pixels).
    """

    hidden_width: int
    embeds_width: int | None
    tokens: int

    def describe(self) -> str:
        """For messages: "hidden states of 1280, image_embeds of 1024, 257 tokens"."""
        embeds = "no image_embeds" if self.embeds_width is None else f"image_embeds of {self.embeds_width}"
        return f"hidden states of {self.hidden_width}, {embeds}, {self.tokens} tokens"


def encoder_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ImageEncoder | None:
    """The encoder that tensors of these names and shapes are, or None when they are no CLIP vision model."""
    for class_name, position_name, projection_name, axis in _LAYOUTS:
        if class_name in shapes and position_name in shapes:
            projection = shapes.get(projection_name)
            return ImageEncoder(
                hidden_width=shapes[class_name][-1],
                embeds_width=None if projection is None else projection[axis],
                tokens=shapes[position_name][-2],
            )
    return None


def read_encoder(path: str | os.PathLike[str]) -> ImageEncoder | None:
    """The encoder in a .safetensors or PyTorch file, by its names and shapes; None for another model or an unreadable
    file.
    """
    try:
        return _open_encoder(Path(path))
    except (AdapterError, OSError):
        return None


def _open_encoder(path: Path) -> ImageEncoder | None:
    """Raises AdapterError or OSError for a file that cannot be read."""
    infos = open_tensors(path, EXPECTED_ENCODER).infos
    try:
        return encoder_from_shapes({name.removeprefix("state_dict."): info.shape for name, info in infos.items()})
    except IndexError:  # tensors of these names with fewer axes
        return None


def encoder_fits(spec: AdapterSpec, encoder: ImageEncoder) -> bool:
    """Whether an encoder makes the features that an adapter takes."""
    if spec.kind == "base":
        return encoder.embeds_width == spec.image_width
    if spec.kind == "full":
        return (encoder.hidden_width, encoder.tokens) == (spec.image_width, spec.tokens)
    published = _PUBLISHED_TOKENS.get(encoder.hidden_width, encoder.tokens)
    wanted = _KOLORS_TOKENS if spec.is_kolors else published
    return encoder.hidden_width == spec.image_width and encoder.tokens == wanted


def find_encoder(
    spec: AdapterSpec, files: Iterable[str | os.PathLike[str]], *, name: str = "The adapter", folder: str = ""
) -> Path:
    """The first of `files`, in order, that holds the image encoder of this adapter.

    `name` is the adapter's and `folder` where encoders belong, both for the message.

    Raises AdapterError that says what each file is, which one to download and where to put it.
    """
    seen: list[str] = []
    for file in map(Path, files):
        try:
            encoder = _open_encoder(file)
        except (AdapterError, OSError) as error:
            reason = re.split(r"; expected| \(|\. ", str(error).removeprefix(f"{file}: "))[0]  # without the advice
            seen.append(f"{file.name} ({reason})")
            continue
        if encoder is not None and encoder_fits(spec, encoder):
            return file
        seen.append(f"{file.name} ({encoder.describe() if encoder else 'not a CLIP vision model'})")
    found = f"Looked at: {'; '.join(seen)}" if seen else "The folder holds no file"
    raise AdapterError(
        f"No image encoder for {name}. It needs {needed_features(spec)} ({spec.encoder}). {found}. "
        f"Download {download_hint(spec)}, and put it into {folder or 'models/clip_vision'}."
    )


def needed_features(spec: AdapterSpec) -> str:
    """For messages: "image_embeds of 1024"."""
    tokens = f", {spec.tokens} tokens" if spec.kind == "full" else ""
    return f"{'image_embeds' if spec.kind == 'base' else 'hidden states'} of {spec.image_width}{tokens}"


def download_hint(spec: AdapterSpec) -> str:
    """Which published file holds the encoder of this adapter."""
    width = spec.image_width or 0
    hidden = _HIDDEN_OF_EMBEDS.get(width, 0) if spec.kind == "base" else width
    return _DOWNLOADS.get(hidden, f"the image encoder that the adapter was trained with ({spec.encoder})")
