"""Files of image prompts: what is in them, and where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, looks_like
from ..ipadapter_core.tensors import TensorFile, open_tensors, read_tensor, write_safetensors
from .types import EncodedImages, ImagePrompt

FOLDER = "image_prompts"  # in ComfyUI's output folder
OLD_SUFFIX = ".ipadpt"

_SUFFIXES = (".safetensors", OLD_SUFFIX)
_OUTPUT = " [output]"  # how ComfyUI marks names of files in its output folder
_FORMAT, _VERSION = "ip_adapter_kit image prompt", 1
_EXPECTED = "a file of Save Image Prompt"
_ADVICE = "Copy it again, or save it again."  # for a broken one; none of them is published
_PARTS = ("positive", "negative")


def list_prompts() -> list[str]:
    """Names of the files in input/ and in output/image_prompts/, marked as ComfyUI marks those of its folders."""
    return list(find_prompts())


def prompt_path(name: str) -> Path:
    """Raises AdapterError for a name that is not in the list."""
    path = find_prompts().get(name)
    if path is None:
        raise AdapterError(
            f"There is no image prompt {name!r}. Make one with Save Image Prompt, or put a file of it or of the old "
            f"Save Embeds ({OLD_SUFFIX}) into {folder_paths.get_input_directory()}; then press R to reload the lists."
        )
    return path


def find_prompts() -> dict[str, Path]:
    """The files by their names in the list."""
    given, saved = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())
    own = {path.relative_to(given).as_posix(): path for path in files_below(given, *_SUFFIXES)}
    made = {path.relative_to(saved).as_posix() + _OUTPUT: path for path in files_below(saved / FOLDER, *_SUFFIXES)}
    return {**dict(sorted(own.items())), **dict(sorted(made.items()))}


def files_below(root: Path, *suffixes: str) -> Iterator[Path]:
    """The files with these suffixes below a folder, those behind links too, as in the model folders; a folder is
    entered once.
    """
    entered: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        entered.add(os.path.realpath(folder))
        below[:] = [name for name in below if os.path.realpath(Path(folder) / name) not in entered]
        for path in (Path(folder) / name for name in names):
            if path.suffix.lower() in suffixes and path.is_file():
                yield path


def write_prompt(path: Path, prompt: ImagePrompt) -> None:
    """Write an image prompt with all that it is for. Raises OSError or SafetensorError when the disk refuses."""
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "one_each": json.dumps(prompt.one_each),
        "has_negative": json.dumps(prompt.has_negative),
        "likeness": json.dumps(prompt.likeness),
    }
    if prompt.adapter is not None:
        metadata["adapter"] = prompt.adapter.replace("\\", "/")
    tensors: dict[str, Tensor] = {}
    for part, images in zip(_PARTS, (prompt.positive, prompt.negative), strict=True):
        if images is not None:
            metadata[f"{part}_weights"] = json.dumps(images.weights)
            features = {"image": images.image, "face": images.face}
            # Clones, because safetensors refuses tensors that share memory.
            tensors |= {f"{part}.{name}": x.cpu().contiguous().clone() for name, x in features.items() if x is not None}
    write_safetensors(path, tensors, metadata)


def read_prompt(path: Path) -> ImagePrompt:
    """The image prompt in a file of Save Image Prompt. Raises AdapterError for any other file, and a damaged one."""
    file = open_tensors(path, _EXPECTED, _ADVICE)
    metadata = file.metadata
    if metadata.get("format") != _FORMAT:
        raise AdapterError(f"{path}: {looks_like(file.infos)}; expected {_EXPECTED}. Choose another file.")
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > _VERSION:
        raise AdapterError(
            f"{path}: format {version} of image prompts; this version of IP-Adapter Kit reads up to {_VERSION}. "
            "Update it."
        )
    try:
        if version != str(_VERSION):
            raise ValueError(f"its version is {version!r}")
        adapter = metadata.get("adapter")
        prompt = ImagePrompt(
            _images(file, metadata, "positive"),
            _images(file, metadata, "negative") if "negative_weights" in metadata else None,
            None if adapter is None else adapter.replace("/", os.sep),  # as this system names files in subfolders
            one_each=bool(json.loads(metadata["one_each"])),
            has_negative=bool(json.loads(metadata["has_negative"])),
            likeness=float(json.loads(metadata["likeness"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: damaged image prompt ({error}). Save it again.") from error
    return prompt


def read_old_features(path: Path) -> EncodedImages:
    """The features in an .ipadpt file: one tensor and nothing else. Raises AdapterError for any other file."""
    features = read_tensor(path, f"the features in an {OLD_SUFFIX} file", _ADVICE)
    if features.ndim not in (2, 3) or 0 in features.shape or not features.is_floating_point():
        raise AdapterError(
            f"{path}: holds a tensor of shape {tuple(features.shape)} ({str(features.dtype).removeprefix('torch.')}); "
            "expected features [images, width] or [images, tokens, width]. Choose another file."
        )
    if not torch.isfinite(features).all():
        raise AdapterError(f"{path}: the features hold NaN or infinity. Encode and save them again.")
    return EncodedImages(_on_intermediate_device(features), weights=(1.0,) * len(features))


def _images(file: TensorFile, metadata: Mapping[str, str], part: str) -> EncodedImages:
    """Raises KeyError, TypeError or ValueError for what Save Image Prompt never writes."""
    weights = tuple(float(weight) for weight in json.loads(metadata[f"{part}_weights"]))
    features: dict[str, Tensor] = {}
    for name, dims in (("image", (2, 3)), ("face", (2,))):
        key = f"{part}.{name}"
        if key in file.infos:
            tensor = file.read(key)
            if tensor.ndim not in dims or len(tensor) != len(weights) or not torch.isfinite(tensor).all():
                raise ValueError(f"{key} has the shape {tuple(tensor.shape)} for {len(weights)} images, or NaN")
            features[name] = _on_intermediate_device(tensor.clone())  # off the file, which may be replaced
    if not features or not weights or not torch.isfinite(torch.tensor(weights)).all():
        raise ValueError(f"{part} has {len(features)} features and the weights {weights}")
    return EncodedImages(features.get("image"), features.get("face"), weights)


def _on_intermediate_device(features: Tensor) -> Tensor:
    return features.to(comfy.model_management.intermediate_device(), torch.float32)
