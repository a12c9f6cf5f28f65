"""The encoder of image prompts: a CLIP vision model from a folder or a single file, and its preprocessing."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from ipadapter_core import looks_like
from ipadapter_core.empty import without_weights
from ipadapter_core.encoders import encoder_from_shapes
from ipadapter_core.published_encoders import CLIP_H, CLIP_L, PUBLISHED_ENCODERS, PublishedEncoder
from ipadapter_core.tensors import TensorFile

from ..errors import BaseModelError
from .hub import find_model
from .image_processor import CLIPImageProcessor
from .parts import load_network, load_part, read_json, weight_files
from .weight_files import check_header, open_weights, weights_fingerprint

_SOURCE = "its page; published adapters use models/image_encoder of https://huggingface.co/h94/IP-Adapter"
_EXPECTED = "image encoder weights"
_PREFIXES = ("vision_model.", "visual_projection.")
_HEADS = 16  # of all published CLIP encoders

log = logging.getLogger(__name__)


class ImageEncoder:
    """An image encoder on disk: its sizes and its preprocessing; `load` reads the weights.

    `path` is a folder of a CLIPVisionModelWithProjection (or of a whole CLIP), or a .safetensors file with
    transformers' names, as in ComfyUI's models/clip_vision. `fallback` is the base model's feature_extractor, and
    `found` describes the folder that `path` was looked for in.

    Raises BaseModelError when `path` is neither.
    """

    def __init__(self, path: Path, fallback: Path | None = None, found: str = "") -> None:
        self.path = path
        if path.is_file():
            self._files = [path]
            self.config = _config_from_shapes(path, self._open())
        elif path.is_dir():
            self.config = _config_of_folder(path)
            self._files = weight_files(path)
            for file in self._files:
                check_header(file, _EXPECTED, _SOURCE)
        else:
            raise BaseModelError(
                f"{path}: no image encoder there{found}. Set image_encoder to a folder, a .safetensors file or a Hub "
                f"id such as h94/IP-Adapter/models/image_encoder, the {CLIP_H.name} of the published adapters; "
                "`ipadapter models clip-vit-h --download` downloads it."
            )
        self.image_dim = int(self.config.projection_dim)  # channels of image_embeds
        self.hidden_dim = int(self.config.hidden_size)  # channels of the hidden states
        self.image_size = int(self.config.image_size)  # side of its input in pixels
        self.num_tokens = (self.image_size // int(self.config.patch_size)) ** 2 + 1  # patches and the class token
        self.processor = _image_processor([path, fallback], self.image_size)

    @property
    def name(self) -> str:
        """The published name, or the sizes."""
        published = published_encoder(self.config, self.image_dim)
        if published is not None:
            return published.name
        c = self.config
        sizes = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.patch_size} px patches at {c.image_size} px"
        return f"CLIP vision encoder ({sizes}, {c.projection_dim} wide)"

    def load(self) -> CLIPVisionModelWithProjection:
        """Read the weights, in the file's dtype."""
        kind = CLIPVisionModelWithProjection
        if self.path.is_dir():
            return load_part(kind, self.path, _SOURCE, config=self.config)
        opened = self._open()
        state = {name: opened.read(name) for name in opened.infos if not name.endswith("position_ids")}
        return load_network(kind, None, list(state), self.path, _SOURCE, config=self.config, state_dict=state)

    def without_weights(self) -> CLIPVisionModelWithProjection:
        """A new encoder on the meta device."""
        with without_weights():
            return CLIPVisionModelWithProjection(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the weights and the preprocessing, read from the files."""
        p: Any = self.processor
        steps = {
            "mean": [float(x) for x in p.image_mean],
            "std": [float(x) for x in p.image_std],
            "side": _side(p),
            "resample": int(p.resample),
        }
        text = weights_fingerprint(self._files, _PREFIXES) + json.dumps(steps, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _open(self) -> TensorFile:
        return open_weights(self.path, _EXPECTED, _SOURCE)


def find_image_encoder(folder: Path, image_encoder: Path | None, needed: bool) -> ImageEncoder | None:
    """The image encoder that is named, else that of the base model in `folder`; None if none is there nor `needed`."""
    inside = folder / "image_encoder"
    if image_encoder is None and not needed and not any((*inside.glob("*.safetensors"), *inside.glob("*.bin"))):
        return None
    found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
    path = inside if image_encoder is None else find_model(image_encoder)
    return ImageEncoder(path, folder / "feature_extractor", f" (found in {folder}: {found})")


def published_encoder(config: Any, image_dim: int | None) -> PublishedEncoder | None:
    """The published encoder with the sizes of a CLIPVisionConfig and `image_dim` channels of image_embeds."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    shape = (config.hidden_size, config.num_hidden_layers, tokens, config.image_size, image_dim)
    for known in PUBLISHED_ENCODERS:
        if shape == (known.hidden_dim, known.layers, known.num_tokens, known.pixels, known.embeds_dim):
            return known
    return None


def _config_of_folder(folder: Path) -> Any:
    """The config of a CLIP vision model, or of the vision half of a whole CLIP. Raises BaseModelError for others."""
    if not (folder / "config.json").is_file():
        inside = folder / "image_encoder"
        advice = f"Use {inside}." if inside.is_dir() else f"Download it from {_SOURCE}."
        raise BaseModelError(f"{folder}: no config.json in it; expected the folder of an image encoder. {advice}")
    config = read_json(folder / "config.json", _SOURCE)
    found = config.get("model_type") or config.get("_class_name", "no class")
    if found == "clip":
        whole = load_part(CLIPConfig, folder, _SOURCE)
        whole.vision_config.projection_dim = whole.projection_dim
        return whole.vision_config
    if found != "clip_vision_model":
        raise BaseModelError(
            f"{folder}: its config.json is of {found}; expected an image encoder (clip_vision_model). Set "
            f"image_encoder to another folder; published adapters use {CLIP_H.name}."
        )
    return load_part(CLIPVisionConfig, folder, _SOURCE)


def _config_from_shapes(path: Path, file: TensorFile) -> Any:
    shapes = {name: info.shape for name, info in file.infos.items()}
    try:
        encoder = encoder_from_shapes(shapes)
        intermediate = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError):
        encoder, intermediate = None, 0
    if encoder is None or encoder.family != "CLIP" or encoder.embeds_dim is None or not encoder.patch:
        raise BaseModelError(
            f"{path}: looks like {looks_like(shapes)}, not an image encoder with transformers' names. Use the "
            f"model.safetensors of a CLIPVisionModelWithProjection; published adapters use {CLIP_H.name}."
        )
    known = sorted({published.hidden_dim for published in PUBLISHED_ENCODERS if published.family == "CLIP"})
    if encoder.hidden_dim not in known:
        raise BaseModelError(
            f"{path}: an image encoder {encoder.hidden_dim} wide. The number of its heads cannot be read from a file "
            f"(known widths: {', '.join(map(str, known))}). Use its folder, with config.json."
        )
    return CLIPVisionConfig(
        hidden_size=encoder.hidden_dim,
        intermediate_size=intermediate,
        projection_dim=encoder.embeds_dim,
        num_hidden_layers=encoder.layers,
        num_attention_heads=_HEADS,
        image_size=round(((encoder.num_tokens or 1) - 1) ** 0.5) * encoder.patch,
        patch_size=encoder.patch,
        hidden_act="quick_gelu" if encoder.hidden_dim == CLIP_L.hidden_dim else "gelu",
    )


def _image_processor(candidates: list[Path | None], size: int) -> CLIPImageProcessor:
    """The encoder's own preprocessing, the base model's if it fits, else CLIP's at the encoder's size."""
    for candidate in candidates:
        if candidate is not None and (candidate / "preprocessor_config.json").is_file():
            processor = load_part(CLIPImageProcessor, candidate)
            if _side(processor) == size:
                return processor
            log.warning("%s: ignored, makes %s px; the image encoder takes %d px", candidate, _side(processor), size)
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _side(processor: CLIPImageProcessor) -> int | None:
    crop: Any = processor.crop_size
    return crop if crop is None or isinstance(crop, int) else crop["height"]
