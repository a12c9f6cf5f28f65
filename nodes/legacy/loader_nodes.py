"""The old loaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ...ipadapter_core import cross_attention_sites
from ..face_analysis import find_files
from ..files import ADAPTERS, ENCODERS, list_files, model_path, stamp, version
from ..lora import add_lora
from ..vision import AUTO, find_encoder_file, load_encoder
from . import fields as f
from .old_faces import load_faces
from .old_node import InsightFace, IPAdapterWire, OldNode
from .preset_table import Preset
from .presets import family_of_context, find_adapter, find_image_encoder, find_lora, find_preset, lora_files
from .wires import open_file

_loaded: WeakValueDictionary[tuple[str, str, str], Any] = WeakValueDictionary()  # kept while a graph holds them


class IPAdapterUnifiedLoader(OldNode):
    TITLE = "IPAdapter Unified Loader"
    REPLACED_BY = "Image Prompt"
    FUNCTION = "load_models"
    _PRESETS: ClassVar[tuple[str, ...]] = (
        "LIGHT - SD1.5 only (low strength)",
        "STANDARD (medium strength)",
        "VIT-G (medium strength)",
        "PLUS (high strength)",
        "PLUS FACE (portraits)",
        "FULL FACE - SD1.5 only (portraits stronger)",
    )
    _MODEL: ClassVar[str] = "model"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.wire(io.Model, "model"),
            f.choice("preset", cls._PRESETS),
            *cls._more_inputs(),
            f.wire(IPAdapterWire, "ipadapter", optional=True),
        ]

    @classmethod
    def _more_inputs(cls) -> Sequence[Any]:
        return []

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [io.Model.Output(display_name=cls._MODEL), IPAdapterWire.Output(display_name="ipadapter")]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when a file that the preset may mean is replaced, or added."""
        loras = lora_files(str(inputs.get("preset")))
        files = [(folder, name) for folder in (ADAPTERS, ENCODERS) for name in list_files(folder)]
        files += [("loras", name) for name in loras]
        faces = _face_files() if issubclass(cls, IPAdapterUnifiedLoaderFaceID) else ""
        return str([stamp(folder, name) for folder, name in files]) + faces

    @classmethod
    def load_models(
        cls, model: Any, preset: str, lora_strength: float = 0.0, provider: str = "CPU", ipadapter: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        wanted = find_preset(preset)
        sites = cross_attention_sites(model.get_model_object("diffusion_model"))
        family = family_of_context(sites[0].cross_attention_dim)
        path = find_adapter(preset, wanted, family)
        adapter = open_file(path)
        pipeline: dict[str, Any] = {
            "clipvision": _image_encoder(wanted, adapter.loaded),
            "ipadapter": {"file": path, "model": adapter},
            "insightface": {"provider": None, "model": None},
        }
        lora = find_lora(wanted, family) if lora_strength > 0 else None
        if lora is not None:
            weights = comfy.utils.load_torch_file(lora, safe_load=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, weights, lora_strength, 0)
        elif lora_strength > 0 and adapter.loaded.lora is not None:
            model = model.clone()  # the adapter's file holds the same LoRA
            add_lora(model, adapter.loaded, sites, lora_strength)
        before = dict((ipadapter or {}).get("insightface") or {})
        if wanted.faces:
            same = before.get("model") is not None and before.get("provider") == provider
            pipeline["insightface"] = before if same else {"provider": provider, "model": _faces(provider)}
        return model, pipeline


class IPAdapterUnifiedLoaderFaceID(IPAdapterUnifiedLoader):
    TITLE = "IPAdapter Unified Loader FaceID"
    REPLACED_BY = "Load Face Analysis and Load IP Adapter"
    _PRESETS = (
        "FACEID",
        "FACEID PLUS - SD1.5 only",
        "FACEID PLUS V2",
        "FACEID PORTRAIT (style transfer)",
        "FACEID PORTRAIT UNNORM - SDXL only (strong)",
    )
    _MODEL = "MODEL"

    @classmethod
    def _more_inputs(cls) -> Sequence[Any]:
        return [
            f.number("lora_strength", 0.6, 0, 1, 0.01),
            f.choice("provider", ["CPU", "CUDA", "ROCM", "DirectML", "OpenVINO", "CoreML"]),
        ]


class IPAdapterUnifiedLoaderCommunity(IPAdapterUnifiedLoader):
    TITLE = "IPAdapter Unified Loader Community"
    _PRESETS = ("Composition", "Kolors")


class IPAdapterModelLoader(OldNode):
    TITLE = "IPAdapter Model Loader"
    REPLACED_BY = "Load IP Adapter"
    FUNCTION = "load_ipadapter_model"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.choice("ipadapter_file", list_files(ADAPTERS))]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [IPAdapterWire.Output()]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when the file is replaced."""
        name = inputs.get("ipadapter_file")
        return str(name and stamp(ADAPTERS, name))

    @classmethod
    def load_ipadapter_model(cls, ipadapter_file: str) -> tuple[Any]:
        return (open_file(str(model_path(ADAPTERS, ipadapter_file))),)


class IPAdapterInsightFaceLoader(OldNode):
    TITLE = "IPAdapter InsightFace Loader"
    REPLACED_BY = "Load Face Analysis"
    FUNCTION = "load_insightface"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.choice("provider", ["CPU", "CUDA", "ROCM"]), f.choice("model_name", ["buffalo_l", "antelopev2"])]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [InsightFace.Output()]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when a file is replaced."""
        return _face_files(str(inputs.get("model_name")))

    @classmethod
    def load_insightface(cls, provider: str, model_name: str) -> tuple[Any]:
        return (_faces(provider, model_name),)


def _image_encoder(preset: Preset, adapter: Any) -> dict[str, Any]:
    """The encoder that fits, and its file; None for adapters that take faces alone."""
    spec = adapter.spec
    if spec.image_dim is None:
        return {"file": None, "model": None}
    path = find_image_encoder(preset, spec) or find_encoder_file(AUTO, adapter.name, spec)
    return {"file": str(path), "model": load_encoder(path, adapter.name, spec)}


def _face_files(name: str = "buffalo_l") -> str:
    return str([(str(file), *version(file)) for file in find_files(name)])


def _faces(provider: str, name: str = "buffalo_l") -> Any:
    key = (provider, name, _face_files(name))
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = load_faces(provider, name)
    return found


NODES = [
    IPAdapterUnifiedLoader,
    IPAdapterUnifiedLoaderFaceID,
    IPAdapterModelLoader,
    IPAdapterInsightFaceLoader,
    IPAdapterUnifiedLoaderCommunity,
]
