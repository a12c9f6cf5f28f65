"""LoadIPAdapter: an adapter file, and the image encoder it was trained with."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_vision
import comfy.ops
import folder_paths
from comfy_api.latest import io

from ..ipadapter_core import AdapterError, AdapterSpec, load_adapter
from ..ipadapter_core.encoders import EXPECTED_ENCODER, find_encoder
from ..ipadapter_core.tensors import open_tensors
from .checks import check_encoder
from .types import IPAdapterModel, manage, node_schema

AUTO = "auto"
ADAPTERS, ENCODERS = "ipadapter", "clip_vision"
_SUFFIXES = {
    ADAPTERS: (".safetensors", ".bin"),
    ENCODERS: (".safetensors", ".sft", ".bin", ".pth", ".pt", ".ckpt"),
}

# The folder that other packs and ComfyUI-Manager use too; extra_model_paths.yaml may have added more places.
folder_paths.add_model_folder_path(ADAPTERS, str(Path(folder_paths.models_dir) / ADAPTERS))


def list_files(folder: str) -> list[str]:
    """Names of the model files of a folder; the folder may also hold readme files and the like."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(_SUFFIXES[folder])]


class LoadIPAdapter(io.ComfyNode):
    """An adapter file -> the adapter and its image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadIPAdapter",
            display_name="Load IP Adapter",
            description="Loads an IP-Adapter and the image encoder (CLIP vision) that it was trained with.",
            inputs=[
                io.Combo.Input(
                    "ipadapter_name",
                    options=list_files(ADAPTERS),
                    tooltip="The adapter, from models/ipadapter. It must fit the base model: SD1.5, SD2 or SDXL.",
                ),
                io.Combo.Input(
                    "clip_vision_name",
                    options=[AUTO, *list_files(ENCODERS)],
                    default=AUTO,
                    optional=True,
                    tooltip="The image encoder, from models/clip_vision. auto: the file there whose tensors have "
                    "the shapes that the adapter needs, whatever its name.",
                ),
            ],
            outputs=[
                IPAdapterModel.Output(display_name="ip_adapter", tooltip="The adapter."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="Its image encoder."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ipadapter_name: str, clip_vision_name: str = AUTO) -> str:
        """Changes when a file is replaced; for auto, when any encoder file is."""
        encoders = list_files(ENCODERS) if clip_vision_name == AUTO else [clip_vision_name]
        files = [(ADAPTERS, ipadapter_name), *((ENCODERS, name) for name in encoders)]
        # ComfyUI gives None for a name that comes over a wire; the file is then looked at when the node runs.
        return str([_stamp(folder, name) for folder, name in files if name is not None])

    @classmethod
    def execute(cls, ipadapter_name: str, clip_vision_name: str = AUTO) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(ADAPTERS, ipadapter_name)
        adapter = load_adapter(path, operations=comfy.ops.manual_cast)
        _check_supported(ipadapter_name, adapter.spec)
        encoder = load_encoder(clip_vision_name, ipadapter_name, adapter.spec)
        return io.NodeOutput(manage(ipadapter_name, adapter), encoder)


def load_encoder(name: str, adapter_name: str, spec: AdapterSpec) -> comfy.clip_vision.ClipVisionModel:
    """The encoder file of this name, or with "auto" the one that fits.

    Raises AdapterError when none fits, or the file is damaged or no CLIP vision model.
    """
    if name == AUTO:
        files = sorted(list_files(ENCODERS), key=lambda file: not file.lower().endswith((".safetensors", ".sft")))
        paths = [folder_paths.get_full_path(ENCODERS, file) for file in files]
        folder = folder_paths.get_folder_paths(ENCODERS)[0]
        path = str(find_encoder(spec, [p for p in paths if p], name=adapter_name, folder=folder))
    else:
        path = folder_paths.get_full_path_or_raise(ENCODERS, name)
        open_tensors(Path(path), EXPECTED_ENCODER)  # a damaged file, or one that holds code, is refused here
    try:
        encoder = comfy.clip_vision.load(path)
    except Exception as error:  # it reads by the suffix, and may meet any other model
        reason = str(error).split("\n", 1)[0]
        raise AdapterError(
            f"{path}: ComfyUI cannot load it as an image encoder ({type(error).__name__}: {reason}). Check that its "
            "suffix is that of its format, or choose another file."
        ) from error
    if encoder is None:
        raise AdapterError(f"{path}: not a CLIP vision model that ComfyUI knows. {adapter_name} needs {spec.encoder}.")
    check_encoder(encoder, path)
    return encoder


def _check_supported(name: str, spec: AdapterSpec) -> None:
    if spec.is_kolors:
        raise AdapterError(
            f"{name} is made for Kolors ({spec.encoder}), which these nodes do not support. Use an adapter for SD1.5 "
            "or SDXL."
        )
    if spec.face_width is not None:
        raise AdapterError(
            f"{name} is a {spec.kind} adapter: it takes face embeddings of {spec.face_width} ({spec.encoder}), which "
            "these nodes do not make. Use a base, plus or full adapter; plus-face files work."
        )


def _stamp(folder: str, name: str) -> tuple[str, int, int] | None:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return None
    status = Path(path).stat()
    return name, status.st_size, status.st_mtime_ns
