"""The files in the model folders, and what is in them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import folder_paths

from ..ipadapter_core import AdapterError, AdapterSpec, infer_spec, read_checkpoint
from ..ipadapter_core.encoders import ImageEncoder, open_encoder
from .node import NONE

ADAPTERS, ENCODERS = "ipadapter", "clip_vision"
H94 = "https://huggingface.co/h94/IP-Adapter"
_SUFFIXES = {
    ADAPTERS: (".safetensors", ".sft", ".bin", ".pth", ".pt", ".ckpt"),
    ENCODERS: (".safetensors", ".sft", ".bin", ".pth", ".pt", ".ckpt"),
}
# What an empty list shows.
_EMPTY = {
    ADAPTERS: f"{NONE}put an adapter into models/ipadapter",
    ENCODERS: f"{NONE}put an image encoder into models/clip_vision",
}

# Other packs and ComfyUI-Manager use this folder too; extra_model_paths.yaml may have added more.
folder_paths.add_model_folder_path(ADAPTERS, str(Path(folder_paths.models_dir) / ADAPTERS))


def list_files(folder: str) -> list[str]:
    """Names of the model files in a folder, without readme files and the like."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(_SUFFIXES[folder])]


def choices(folder: str) -> list[str]:
    """The choices of a list: the files of this folder, or one line about where to put them."""
    return list_files(folder) or [_EMPTY[folder]]


def main_folder(folder: str) -> str:
    """The first of the places of a model folder: where to put files."""
    return folder_paths.get_folder_paths(folder)[0]


def is_empty_choice(name: str) -> bool:
    """Whether a name is the line of an empty list."""
    return name in _EMPTY.values()


def adapter_path(name: str) -> Path:
    """Raises AdapterError when the folder is empty, or this file is not in it."""
    if not list_files(ADAPTERS):
        raise AdapterError(
            f"There is no adapter in {main_folder(ADAPTERS)}. Download ip-adapter-plus_sd15.safetensors (SD1.5) or "
            f"ip-adapter-plus_sdxl_vit-h.safetensors (SDXL) from {H94} into it, then press R to reload the lists."
        )
    return model_path(ADAPTERS, name)


def model_path(folder: str, name: str) -> Path:
    """Raises AdapterError for a file that is not there, as when it is a link to nothing."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise AdapterError(
            f"{name} is not in {main_folder(folder)}, or it is a link to a file that is gone. Put it there, or press R "
            "to reload the lists and choose another file."
        )
    return Path(path)


def model_files(folder: str) -> dict[Path, str]:
    """The files of a folder, path -> name; safetensors first."""
    names = sorted(list_files(folder), key=lambda name: not name.lower().endswith((".safetensors", ".sft")))
    paths = {name: folder_paths.get_full_path(folder, name) for name in names}
    return {Path(path): name for name, path in paths.items() if path is not None}


def stamp(folder: str, name: str) -> tuple[str, int, int] | None:
    """Name, size and time of change of a file in a folder; None when it is not there."""
    path = folder_paths.get_full_path(folder, name)
    return None if path is None else (name, *version(Path(path)))


def adapter_spec(path: Path) -> AdapterSpec:
    """The spec of an adapter file, from its header, cached. Raises AdapterError or OSError."""
    return _adapter_spec(path, version(path))


def encoder_shape(path: Path) -> ImageEncoder | None:
    """The same for an image encoder; None for another model."""
    return _encoder_shape(path, version(path))


@lru_cache(maxsize=512)
def _adapter_spec(path: Path, _: tuple[int, int]) -> AdapterSpec:
    return infer_spec(read_checkpoint(path))


@lru_cache(maxsize=512)
def _encoder_shape(path: Path, _: tuple[int, int]) -> ImageEncoder | None:
    return open_encoder(path)


def version(path: Path) -> tuple[int, int]:
    """Size and time of change, which differ when a file is replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
