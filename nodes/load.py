"""LoadIPAdapter: an adapter file, and the image encoder it was trained with."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.ops
from comfy_api.latest import io, ui

from ..ipadapter_core import (
    AdapterError,
    AdapterSpec,
    adapter_from_checkpoint,
    infer_spec,
    read_checkpoint,
    shortcut_hint,
)
from .files import ADAPTERS, ENCODERS, adapter_path, choices, list_files, stamp
from .message import advanced, show_on_node
from .node import Node
from .types import IPAdapterModel, LoadedAdapter, manage, node_schema
from .vision import AUTO, find_encoder_file, load_encoder

FROM_FILE, V1, V2 = "from the file", "v1", "v2"
_log = logging.getLogger(__name__)


class LoadIPAdapter(Node):
    """An adapter file -> the adapter and its image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadIPAdapter",
            display_name="Load IP Adapter",
            description="Loads an IP-Adapter and the image encoder (CLIP vision) that it was trained with.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "ipadapter_name",
                    options=choices(ADAPTERS),
                    tooltip="The adapter, from models/ipadapter. It must fit the base model: SD1.5, SD2, SDXL or "
                    "Kolors. To start: ip-adapter-plus_sd15 or ip-adapter-plus_sdxl_vit-h from h94/IP-Adapter.",
                ),
                io.Combo.Input(
                    "clip_vision_name",
                    options=[AUTO, *choices(ENCODERS)],
                    default=AUTO,
                    optional=True,
                    tooltip="The image encoder, from models/clip_vision. auto: the file whose tensors have the "
                    "shapes that the adapter needs, whatever its name.",
                ),
                io.Combo.Input(
                    "faceid_plus",
                    options=[FROM_FILE, V1, V2],
                    default=FROM_FILE,
                    optional=True,
                    tooltip="Only for FaceID-Plus, whose v1 and v2 files have the same tensors. from the file: "
                    "decided by its metadata, otherwise by its name (plusv2); the node shows which.",
                    **advanced(),
                ),
                io.Int.Input(
                    "encoder_resolution",
                    default=0,
                    min=0,
                    max=1024,
                    step=1,
                    optional=True,
                    tooltip="Side of the encoder's input image, in pixels. 0: the encoder's own resolution (224 for "
                    "most), or that in the adapter's file. Try 448 for an adapter that was trained with it; its "
                    "model card names it.",
                    **advanced(),
                ),
            ],
            outputs=[
                IPAdapterModel.Output(display_name="ip_adapter", tooltip="The adapter."),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="The adapter's image encoder; empty for FaceID and portrait adapters, which only use "
                    "faces.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        ipadapter_name: str,
        clip_vision_name: str = AUTO,
        faceid_plus: str = FROM_FILE,
        encoder_resolution: int = 0,
    ) -> str:
        """Changes when a file is replaced; for auto, when any encoder file is."""
        encoders = list_files(ENCODERS) if clip_vision_name == AUTO else [clip_vision_name]
        files = [(ADAPTERS, ipadapter_name), *((ENCODERS, name) for name in encoders)]
        # ComfyUI gives None for a name that comes over a wire; the file is then looked at when the node runs.
        return str([stamp(folder, name) for folder, name in files if name is not None])

    @classmethod
    def execute(
        cls,
        ipadapter_name: str,
        clip_vision_name: str = AUTO,
        faceid_plus: str = FROM_FILE,
        encoder_resolution: int = 0,
    ) -> io.NodeOutput:
        path = adapter_path(ipadapter_name)
        loaded = load_adapter_file(path, ipadapter_name, faceid_plus)
        text, encoder = f"{loaded.spec.describe()}.", None
        if loaded.spec.image_dim is not None:
            file = find_encoder_file(clip_vision_name, ipadapter_name, loaded.spec)
            encoder = load_encoder(file, ipadapter_name, loaded.spec, encoder_resolution)
            text += f" Image encoder: {file.name}, {encoder.image_size} pixels."
        elif clip_vision_name != AUTO or encoder_resolution:
            text += " It takes no image encoder: clip_vision_name and encoder_resolution have no effect."
            _log.warning("Load IP Adapter: %s: %s", ipadapter_name, text)
        show_on_node(cls, text)
        return io.NodeOutput(loaded, encoder, ui=ui.PreviewText(text))


def load_adapter_file(path: Path, name: str, faceid_plus: str = FROM_FILE) -> LoadedAdapter:
    """An adapter under ComfyUI's memory management. Raises AdapterError for a file that is no adapter for a UNet."""
    checkpoint = read_checkpoint(path)
    shortcut = shortcut_of(infer_spec(checkpoint), name, faceid_plus)
    adapter = adapter_from_checkpoint(checkpoint, operations=comfy.ops.manual_cast, shortcut=shortcut)
    if adapter.spec.lookalike:
        _log.warning("%s: %s", name, adapter.spec.lookalike)
    return manage(name, adapter)


def shortcut_of(spec: AdapterSpec, name: str, faceid_plus: str) -> bool | None:
    """Whether a FaceID-Plus adapter is a v2, by the choice, the metadata or, as a hint, the file's name; None for
    other kinds. Raises AdapterError when none of them tells.
    """
    if faceid_plus != FROM_FILE:
        if spec.kind == "faceid-plus":
            return faceid_plus == V2
        raise AdapterError(
            f"faceid_plus is {faceid_plus}, and {name} is a {spec.kind} adapter, which has no versions. Set it to "
            f"{FROM_FILE!r}."
        )
    if spec.kind != "faceid-plus" or spec.shortcut is not None:
        return None
    hint = shortcut_hint(name)
    if hint is None:
        raise AdapterError(
            f"{name} is a FaceID-Plus adapter, and neither its metadata nor its name tells v1 from v2. Set faceid_plus."
        )
    _log.warning(
        "Load IP Adapter: %s is loaded as FaceID-Plus %s, as its name suggests. Set faceid_plus if it is the other.",
        name,
        V2 if hint else V1,
    )
    return hint
