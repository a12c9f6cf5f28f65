"""LoadFaceAnalysis: insightface's models for face detection and recognition."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..ipadapter_core import AdapterError
from ..ipadapter_core.file_types import START, FileType, download_again, type_of, unexpected_type
from .files import version
from .node import Node
from .types import SEARCH_ALIASES, node_schema

FaceAnalysisType = io.Custom("FACE_ANALYSIS")

FOLDER = "insightface"
PAGE = "https://github.com/deepinsight/insightface/releases/tag/v0.7"
# The detection and the recognition model of the published packs. Their other files are not needed.
PACKS = {
    "buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"),
    "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
}
FACE_ALIASES = [*SEARCH_ALIASES, "faceid", "insightface", "portrait"]
PROVIDERS = {
    "CPU": "CPUExecutionProvider",
    "CUDA": "CUDAExecutionProvider",
    "ROCM": "ROCMExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "OpenVINO": "OpenVINOExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
}
_log = logging.getLogger("ip_adapter_kit")

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


@dataclass(frozen=True, eq=False)
class FaceAnalysis:
    """The face models of the folder `name`: insightface's SCRFD and ArcFaceONNX. They do not change."""

    name: str
    detector: Any
    recognizer: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> FaceAnalysis:
        return self  # a copy would load the models again


class LoadFaceAnalysis(Node):
    """A folder of face models -> what Encode Face Prompt finds faces with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadFaceAnalysis",
            display_name="Load Face Analysis",
            description="Loads the insightface models that FaceID adapters need. The published ones are for "
            "non-commercial research only.",
            search_aliases=FACE_ALIASES,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_packs(),
                    default="buffalo_l",
                    tooltip="A folder in models/insightface/models. Use buffalo_l for SD1.5 and SDXL, antelopev2 for "
                    "Kolors: the models that the published adapters were trained with.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="CPU",
                    optional=True,
                    tooltip="The device that runs the models. CPU takes about a second per image and no GPU memory; "
                    "the others need their own build of onnxruntime.",
                ),
            ],
            outputs=[FaceAnalysisType.Output(display_name="face_analysis", tooltip="Connect to Encode Face Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, provider: str | None = "CPU") -> str:
        """Changes when a file is replaced. ComfyUI gives None for a value that comes over a wire."""
        files = [] if model_name is None else find_files(model_name)
        return str([(str(file), *version(file)) for file in files])

    @classmethod
    def execute(cls, model_name: str, provider: str = "CPU") -> io.NodeOutput:
        return io.NodeOutput(load_face_analysis(model_name, provider))


def list_packs() -> list[str]:
    """The published packs, present or not, and every other folder of models."""
    folders = [folder for root in _roots() if root.is_dir() for folder in sorted(root.iterdir())]
    return list(dict.fromkeys([*PACKS, *(folder.name for folder in folders if _models_in(folder))]))


def find_files(name: str) -> list[Path]:
    """The model files of a folder: of a published pack the two that are needed, where they are there."""
    for root in _roots():
        files = _models_in(root / Path(name).name)
        if files:
            needed = [file for file in files if file.name in PACKS.get(name, ())]
            return needed if len(needed) == 2 else files
    return []


def load_face_analysis(name: str, provider: str = "CPU", *, fall_back: bool = False) -> FaceAnalysis:
    """The detection and the recognition model of a folder. With `fall_back`, the CPU runs them, and a line is logged,
    where the provider is missing.

    Raises AdapterError when insightface, the files or the provider are missing, or a file is damaged.
    """
    zoo, runtime = _import_insightface()
    files = find_files(name)
    detection, recognition = PACKS.get(name, PACKS["buffalo_l"])
    source = f"{name if name in PACKS else 'buffalo_l'}.zip at {PAGE}"
    if not files:
        raise AdapterError(
            f"No face models in {_roots()[0] / name}. Put {detection} and {recognition} there, from {source} (for "
            "non-commercial research only)."
        )
    offered = [short for short, long in PROVIDERS.items() if long in runtime.get_available_providers()]
    if provider not in offered:
        message = f"The installed onnxruntime offers {', '.join(offered)}, not {provider}."
        if not fall_back:
            raise AdapterError(f"{message} Choose {offered[0]}, or install the onnxruntime for {provider}.")
        _log.warning("%s The CPU runs the face models of %s.", message, name)
        provider = "CPU"
    models: dict[str, Any] = {}
    for file in files:
        model = _load(zoo, file, list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["CPU"]])))
        models.setdefault(getattr(model, "taskname", ""), model)
    missing = [task for task in ("detection", "recognition") if task not in models]
    if missing or not models["detection"].use_kps:
        found = f"no {missing[0]} model" if missing else "a detection model without landmarks"
        raise AdapterError(
            f"{files[0].parent} holds {found}: {', '.join(file.name for file in files)}. Put {detection} and "
            f"{recognition} there, from {source}."
        )
    detector, recognizer = models["detection"], models["recognition"]
    for model in (detector, recognizer):
        if model.session.get_providers()[0] != PROVIDERS[provider]:
            message = f"onnxruntime could not start {provider}; the reason is in the console."
            if not fall_back:
                raise AdapterError(f"{message} Choose the provider CPU.")
            _log.warning("%s The CPU runs the face models of %s.", message, name)
            break
    detector.prepare(0, det_thresh=0.5, input_size=(640, 640))
    return FaceAnalysis(name, detector, recognizer)


def _import_insightface() -> tuple[Any, Any]:
    try:
        import onnxruntime  # noqa: PLC0415
        from insightface import model_zoo  # noqa: PLC0415
    except ImportError as error:
        raise AdapterError(
            f'Face adapters need insightface, which cannot be imported ({error}). Install it with: "{sys.executable}" '
            '-m pip install "insightface>=2" and restart ComfyUI.'
        ) from error
    return model_zoo, onnxruntime


def _load(zoo: Any, file: Path, providers: list[str]) -> Any:
    """One model; None when insightface does not support it. Given a path, insightface downloads nothing."""
    try:
        # One session serves every detection size; insightface 2 would make one for each.
        return zoo.get_model(str(file), providers=providers, static_shape_sessions=False)
    except Exception as error:  # onnxruntime has many kinds, none of them public
        if _other_type(file) is not None:
            raise unexpected_type(file, "an ONNX model", download_again(PAGE)) from error
        reason = str(error).split("\n", 1)[0]
        raise AdapterError(
            f"{file}: onnxruntime cannot load it ({reason}). It is damaged or no face model: download it again from "
            f"{PAGE}."
        ) from error


def _other_type(file: Path) -> FileType | None:
    """The type of a file that is no model, such as a web page; None when its first bytes do not show it."""
    try:
        with file.open("rb") as stream:
            return type_of(stream.read(START))
    except OSError:
        return None


def _roots() -> list[Path]:
    return [Path(path) / "models" for path in folder_paths.get_folder_paths(FOLDER)]


def _models_in(folder: Path) -> list[Path]:
    """Its .onnx files; unpacked archives may hold a second folder of the same name."""
    return sorted(folder.glob("*.onnx")) or sorted((folder / folder.name).glob("*.onnx"))
