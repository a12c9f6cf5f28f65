"""ComfyUI's image encoders: loaded from a file, also for other resolutions; and a fix for DINOv3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.clip_vision
import torch
from torch import Tensor, nn

from ..ipadapter_core import AdapterError, AdapterSpec
from ..ipadapter_core.encoders import EXPECTED_ENCODER, find_encoder
from ..ipadapter_core.tensors import open_tensors
from .checks import check_encoder
from .files import ENCODERS, encoder_shape, is_empty_choice, main_folder, model_files, model_path, version

AUTO = "auto"

_loaded: WeakValueDictionary[tuple[Path, tuple[int, int], int], comfy.clip_vision.ClipVisionModel] = (
    WeakValueDictionary()
)


def find_encoder_file(name: str, adapter_name: str, spec: AdapterSpec) -> Path:
    """The encoder file of this name, or with "auto" the one that fits.

    Raises AdapterError when none fits, or the file is damaged.
    """
    if name == AUTO or is_empty_choice(name):
        return find_encoder(
            spec, model_files(ENCODERS), name=adapter_name, folder=main_folder(ENCODERS), open_file=encoder_shape
        )
    path = model_path(ENCODERS, name)
    open_tensors(path, EXPECTED_ENCODER)  # a damaged file, or one that holds code, is refused here
    return path


def load_encoder(
    name: str | Path, adapter_name: str, spec: AdapterSpec, resolution: int = 0
) -> comfy.clip_vision.ClipVisionModel:
    """The encoder of this file, or of a name as `find_encoder_file` takes it, for images of `resolution` pixels (0:
    what the adapter's file says, else the encoder's own). The one in memory while any node holds it.

    Raises AdapterError when none fits, or the file is damaged, no CLIP vision model, or takes no such size.
    """
    path = name if isinstance(name, Path) else find_encoder_file(name, adapter_name, spec)
    pixels = resolution or spec.encoder_resolution or 0
    key = (path, version(path), pixels)
    encoder = _loaded.get(key)
    if encoder is None:
        encoder = read_encoder_file(path, f"{adapter_name} needs {spec.encoder}.")
        set_resolution(encoder, pixels, str(path))
        check_encoder(encoder, str(path))
        _loaded[key] = encoder
    return encoder


def read_encoder_file(path: Path, advice: str) -> comfy.clip_vision.ClipVisionModel:
    """An image encoder by ComfyUI's own loader; `advice` ends the message for another model."""
    try:
        encoder = comfy.clip_vision.load(str(path))
    except Exception as error:  # it reads by the suffix, and may meet any other model
        reason = str(error).split("\n", 1)[0]
        raise AdapterError(
            f"{path}: ComfyUI cannot load it as an image encoder ({type(error).__name__}: {reason}). Check that its "
            "suffix is that of its format, or choose another file."
        ) from error
    if encoder is None:
        raise AdapterError(f"{path}: not a CLIP vision model that this ComfyUI knows. {advice}")
    if "DINOv3" in type(encoder.model).__name__:
        _keep_hidden_states(encoder.model)
    return encoder


def set_resolution(encoder: Any, pixels: int, name: str) -> None:
    """Let an encoder take images of `pixels` x `pixels` (0: its own size), in place: the position embedding is
    interpolated, bicubic as transformers does, where the architecture has one of a fixed size.

    Raises AdapterError for a size that is no multiple of the encoder's patch, or an encoder of another architecture.
    """
    model = encoder.model
    embeddings = model.vision_model.embeddings if hasattr(model, "vision_model") else model.embeddings
    patch = _patch_size(embeddings)
    own = encoder.image_size
    if own <= 0:  # SigLIP2 NaFlex: any shape of so many patches
        own = patch * math.isqrt(encoder.config["num_patches"])
    pixels = pixels or own
    if pixels % patch:
        raise AdapterError(
            f"{name} takes images in patches of {patch} pixels, and encoder_resolution {pixels} is no multiple of "
            f"that. Use {max(1, round(pixels / patch)) * patch}, or 0 for its own {own}."
        )
    count = (pixels // patch) ** 2
    table = getattr(embeddings, "position_embedding", None)
    if pixels != own and hasattr(embeddings, "position_embeddings"):  # DINOv2
        resized = _resized(embeddings.position_embeddings[0], count, 1)
        embeddings.position_embeddings = nn.Parameter(resized[None], requires_grad=False)
    elif pixels != own and table is not None and hasattr(embeddings, "class_embedding"):  # CLIP and SigLIP
        extra = 0 if embeddings.class_embedding is None else 1
        table.weight = nn.Parameter(_resized(table.weight, count, extra), requires_grad=False)
        table.num_embeddings = count + extra
    encoder.image_size = pixels  # SigLIP2 interpolates by itself, DINOv3 has no position embedding


def _patch_size(embeddings: Any) -> int:
    """Pixels of a patch."""
    if isinstance(getattr(embeddings, "patch_size", None), int):
        return embeddings.patch_size
    layer = embeddings.patch_embedding if hasattr(embeddings, "patch_embedding") else embeddings.patch_embeddings
    return int(getattr(layer, "projection", layer).kernel_size[0])


def _resized(table: Tensor, count: int, extra: int) -> Tensor:
    """A position embedding [extra + n * n, D] for `count` patches in a square; the first `extra` rows stay."""
    before, after = math.isqrt(len(table) - extra), math.isqrt(count)
    grid = table[extra:].float().T.reshape(1, -1, before, before)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:extra], grid.flatten(2)[0].T.to(table.dtype)])


def _keep_hidden_states(model: Any) -> None:
    """ComfyUI's DINOv3 gives None for the penultimate hidden states, and encode_image fails on it."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept[:] = [output]

    def give(_: nn.Module, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        between = kept.pop()
        return (output[0], between if output[1] is None else output[1], *output[2:])

    model.layer[-2].register_forward_hook(keep)
    model.register_forward_hook(give)
