"""The frozen encoder of image prompts: a CLIP vision model from a folder or a single file, and its preprocessing."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from ipadapter_core import looks_like
from ipadapter_core.tensors import TensorFile, TensorInfo

from ..errors import BaseModelError
from .image_processor import CLIPImageProcessor
from .parts import chosen_weights, load_network, load_part, read_json
from .weight_files import check_header, open_weights, weights_fingerprint

_VIT_H = "CLIP ViT-H/14"
_ENCODER_NAMES = {  # (width, layers, patch, projection) -> the name that adapters are published with
    (1280, 32, 14, 1024): _VIT_H,
    (1664, 48, 14, 1280): "OpenCLIP ViT-bigG/14",
    (1024, 24, 14, 768): "CLIP ViT-L/14",
}
# What shapes cannot tell: (heads, activation) of the encoders that adapters are published with, by width.
_BY_WIDTH = {1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_SOURCE = "its page; published adapters use models/image_encoder of https://huggingface.co/h94/IP-Adapter"
_EXPECTED = "image encoder weights"
_PREFIXES = ("vision_model.", "visual_projection.")

log = logging.getLogger(__name__)


class ImageEncoder:
    """An image encoder on disk: its config and preprocessing; `load` reads the weights.

    `path` is a folder of a CLIPVisionModelWithProjection (or of a whole CLIP), or a .safetensors file with
    transformers' names, as in ComfyUI's models/clip_vision. `fallback` is the base model's feature_extractor.

    Raises BaseModelError when it is neither, saying what is there.
    """

    def __init__(self, path: Path, fallback: Path | None = None, found_beside: str = "") -> None:
        self.path = path
        if path.is_file():
            self._files = [path]
            self.config = _config_from_shapes(path, self._open().infos)
        elif path.is_dir():
            self.config = _config_of_folder(path)
            self._files = chosen_weights(path).files
            for file in self._files:
                check_header(file, _EXPECTED, _SOURCE)
        else:
            raise BaseModelError(
                f"{path}: no image encoder there{found_beside}. Set image_encoder to a folder, a .safetensors file or "
                f"a Hub id such as h94/IP-Adapter/models/image_encoder, the {_VIT_H} of the published adapters; "
                "`ipadapter models clip-vit-h --download` downloads it."
            )
        self.processor = _image_processor([path, fallback], int(self.config.image_size))

    @property
    def name(self) -> str:
        """The image encoder as people know it, or its sizes (`fingerprint` tells them apart)."""
        c = self.config
        shape = (c.hidden_size, c.num_hidden_layers, c.patch_size, c.projection_dim)
        sizes = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.patch_size} px patches at {c.image_size} px"
        return _ENCODER_NAMES.get(shape, f"CLIP vision encoder ({sizes}, {c.projection_dim} wide)")

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (int(self.config.image_size) // int(self.config.patch_size)) ** 2 + 1

    def load(self) -> CLIPVisionModelWithProjection:
        """Read the weights, in the file's dtype."""
        kind = CLIPVisionModelWithProjection
        if self.path.is_dir():
            return load_part(kind, self.path, _SOURCE, config=self.config)
        opened = self._open()
        state = {name: opened.read(name) for name in opened.infos if not name.endswith("position_ids")}
        return load_network(kind, None, list(state), self.path, _SOURCE, config=self.config, state_dict=state)

    def _open(self) -> TensorFile:
        return open_weights(self.path, _EXPECTED, _SOURCE)

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


def _config_of_folder(folder: Path) -> CLIPVisionConfig:
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
            f"image_encoder to another folder; published adapters use {_VIT_H}."
        )
    return load_part(CLIPVisionConfig, folder, _SOURCE)


def _config_from_shapes(file: Path, infos: Mapping[str, TensorInfo]) -> CLIPVisionConfig:
    shapes = {name: info.shape for name, info in infos.items()}
    layers = {name.split(".")[3] for name in shapes if name.startswith("vision_model.encoder.layers.")}
    try:
        width = shapes["vision_model.embeddings.class_embedding"][0]
        patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
        tokens = shapes["vision_model.embeddings.position_embedding.weight"][0]
        intermediate = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes["visual_projection.weight"][0]
        side = math.isqrt(tokens - 1) * patch
    except (KeyError, IndexError, ValueError) as error:
        raise BaseModelError(
            f"{file}: looks like {looks_like(shapes)}, not an image encoder with transformers' names ({error} is "
            f"missing). Use the model.safetensors of a CLIPVisionModelWithProjection; published adapters use {_VIT_H}."
        ) from error
    if width not in _BY_WIDTH:
        known = ", ".join(map(str, _BY_WIDTH))
        raise BaseModelError(
            f"{file}: an image encoder {width} wide; a file alone does not say how many heads it has (known widths: "
            f"{known}). Use its folder, with config.json."
        )
    heads, activation = _BY_WIDTH[width]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=projection,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        hidden_act=activation,
    )


def _image_processor(candidates: list[Path | None], size: int) -> CLIPImageProcessor:
    """The encoder's own preprocessing, the base model's if it fits, else CLIP's at the encoder's size."""
    for candidate in candidates:
        if candidate is not None and (candidate / "preprocessor_config.json").is_file():
            processor = load_part(CLIPImageProcessor, candidate)
            if _side(processor) == size:
                return processor
            log.warning(
                "%s makes images of %s px, the image encoder takes %d px: ignored",
                candidate,
                _side(processor),
                size,
            )
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _side(processor: CLIPImageProcessor) -> int | None:
    crop: Any = processor.crop_size
    return crop if crop is None or isinstance(crop, int) else crop["height"]
