"""The IPADAPTER wire. It carries an adapter ({"image_proj", "ip_adapter"}) or what a unified loader found
({"ipadapter", "clipvision", "insightface"}). Other packs make and read both, so both keep their shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.ops

from ...ipadapter_core import AdapterError, IPAdapter, load_adapter
from ...ipadapter_core.adapter import adapter_from_checkpoint
from ...ipadapter_core.checkpoint import checkpoint_from_state
from ...ipadapter_core.projectors import FaceIDPlusProjection
from ...ipadapter_core.spec import with_shortcut
from ..files import version
from ..types import LoadedAdapter, manage

_OURS = "ip_adapter_kit"  # in an adapter of another pack: the LoadedAdapter made of it
_files: WeakValueDictionary[tuple[str, int, int], AdapterFile] = WeakValueDictionary()


class AdapterFile(Mapping[str, Any]):
    """An adapter under ComfyUI's memory management that reads like the old pack's: its two parts by name, and a flag
    for FaceID-Plus v2 and for raw face embeddings. The parts are looked up when somebody asks for them.
    """

    def __init__(self, loaded: LoadedAdapter) -> None:
        self.loaded = loaded

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        adapter = self.loaded.adapter
        if key == "image_proj":
            return adapter.projector.state_dict()
        if key == "ip_adapter":
            lora = self.loaded.lora
            return {**adapter.layers.state_dict(), **({} if lora is None else lora.state_dict())}
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def _keys(self) -> list[str]:
        spec = self.loaded.spec
        flags = {"faceidplusv2": bool(spec.shortcut), "portraitunnorm": spec.unnormalised}
        return ["image_proj", "ip_adapter", *(name for name, is_set in flags.items() if is_set)]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What an apply node works with; `clip_vision` and `insightface` may be missing where the adapter needs none."""

    adapter: LoadedAdapter
    clip_vision: Any = None
    insightface: Any = None


def open_pipeline(
    ipadapter: Any, *, clip_vision: Any = None, insightface: Any = None, needs_pipeline: bool = False
) -> Pipeline:
    """Either value of the wire; `clip_vision` and `insightface` are connected ones, which win."""
    if "ipadapter" not in ipadapter:
        if needs_pipeline:
            raise AdapterError(
                "The ipadapter comes without an image encoder. Connect IPAdapter Unified Loader, or use IPAdapter "
                "Advanced with a clip_vision."
            )
        return Pipeline(loaded_adapter(ipadapter), clip_vision, insightface)
    parts = {name: (ipadapter.get(name) or {}).get("model") for name in ("ipadapter", "clipvision", "insightface")}
    if parts["ipadapter"] is None:
        raise AdapterError("The unified loader has no adapter. Choose another preset.")
    return Pipeline(
        loaded_adapter(parts["ipadapter"]),
        clip_vision if clip_vision is not None else parts["clipvision"],
        insightface if insightface is not None else parts["insightface"],
    )


def open_file(path: str) -> AdapterFile:
    """An adapter file. While anything holds it, the same file is not read again."""
    key = (path, *version(Path(path)))
    found = _files.get(key)
    if found is None:
        adapter = load_adapter(path, operations=comfy.ops.manual_cast)
        name = Path(path).name
        found = _files[key] = AdapterFile(manage(name, _with_version(adapter, is_v2="plusv2" in name.lower())))
    return found


def loaded_adapter(value: Any) -> LoadedAdapter:
    """The adapter on the wire, from our loaders or as tensors from another pack's."""
    if isinstance(value, LoadedAdapter):
        return value
    if isinstance(value, AdapterFile):
        return value.loaded
    if isinstance(value.get(_OURS), LoadedAdapter):
        return value[_OURS]
    if not isinstance(value.get("ip_adapter"), Mapping) or not isinstance(value.get("image_proj"), Mapping):
        raise AdapterError(
            f"The ipadapter holds {', '.join(map(str, value))}; expected image_proj and ip_adapter. Connect IPAdapter "
            "Model Loader."
        )
    state = {f"{part}.{name}": value[part][name] for part in ("image_proj", "ip_adapter") for name in value[part]}
    checkpoint = checkpoint_from_state(state, path="The connected ipadapter")
    adapter = adapter_from_checkpoint(checkpoint, operations=comfy.ops.manual_cast)
    adapter = _with_version(adapter, is_v2=bool(value.get("faceidplusv2")))
    value[_OURS] = loaded = manage("The connected ipadapter", adapter)
    return loaded


def _with_version(adapter: IPAdapter, *, is_v2: bool) -> IPAdapter:
    """FaceID-Plus is v2 for Kolors or by the file's name or metadata, else v1, as in the old pack."""
    projector = adapter.projector
    if isinstance(projector, FaceIDPlusProjection) and projector.shortcut is None:
        projector.shortcut = is_v2 or adapter.spec.is_kolors
        adapter.spec = with_shortcut(adapter.spec, projector.shortcut)
    return adapter
