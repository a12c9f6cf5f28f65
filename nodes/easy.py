"""ImagePrompt: the one node to start with. Model and image in, guided model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.clip_vision
from comfy_api.latest import io, ui
from torch import Tensor, nn

from ..ipadapter_core import AdapterError, LayerWeight, Site, cross_attention_sites, layer_weights, weight_layout
from .demo import load_image_encoder
from .encode import EncodeImagePrompt
from .files import ADAPTERS, ENCODERS, list_files, stamp, version
from .install import apply_prompt
from .load import load_adapter_file
from .message import advanced, show_on_node
from .node import Node
from .pairs import COMPOSITION, LIKENESS, PLUS, STYLE, SUBJECT, USES, Pair, find_pair
from .types import LoadedAdapter, node_schema
from .vision import load_encoder

_WEIGHT_TYPES = {STYLE: "style transfer", COMPOSITION: "composition"}  # linear for the others
_KEPT = len(USES)  # loaded pairs for each model

Loaded = tuple[LoadedAdapter, comfy.clip_vision.ClipVisionModel]

# So that another weight reads no file and runs no encoder. They go with the model that they guide.
_loaded: WeakKeyDictionary[nn.Module, dict[Any, Loaded]] = WeakKeyDictionary()


class ImagePrompt(Node):
    """Model and image -> the model with the image as a prompt; the files are found."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="ImagePrompt",
            display_name="Image Prompt",
            description="Guides the model with an image, in addition to the text. Start with this node: it finds an "
            "adapter and an image encoder that fit the model, and shows which ones it uses.",
            essentials_category="Image Generation",
            has_intermediate_output=True,  # the preview survives a reload of the page
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2, SDXL or Kolors model, or the demo model."),
                io.Image.Input(
                    "image", tooltip="The result will resemble this image. The encoder sees its middle square."
                ),
                io.Float.Input(
                    "weight",
                    default=0.7,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Strength of the image. 0.5 to 0.8 with a text, 1 with an empty text; 0 is off.",
                ),
                io.Combo.Input(
                    "use_for",
                    options=list(USES),
                    default=SUBJECT,
                    tooltip="What to take from the image. subject: all of it. style and composition: only the layers "
                    "responsible for them; try weight 1. face: uses an adapter for faces, if there is one.",
                ),
                io.Combo.Input(
                    "likeness",
                    options=list(LIKENESS),
                    default=PLUS,
                    optional=True,
                    tooltip="plus keeps most of the image, standard follows the text more, light even more. The "
                    "closest available adapter is used. Adapters for faces, for composition and light ones have the "
                    "same tensor shapes as others, so they are recognised by their file names.",
                    **advanced(),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect to the sampler. The input model is not changed.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Changes when a file of the two folders comes, goes or is replaced."""
        return str([stamp(folder, name) for folder in (ADAPTERS, ENCODERS) for name in list_files(folder)])

    @classmethod
    def execute(
        cls, model: Any, image: Tensor, weight: float = 0.7, use_for: str = SUBJECT, likeness: str = PLUS
    ) -> io.NodeOutput:
        unet = model.get_model_object("diffusion_model")
        sites = cross_attention_sites(unet)
        pair = find_pair(unet, sites, use_for, likeness)
        weight_type = _WEIGHT_TYPES.get(use_for, "linear")
        if use_for == COMPOSITION and pair.is_for_composition:
            weight_type = "linear"
        weights = _weights(sites, weight_type, weight, use_for)
        ip_adapter, encoder = _load(model.model, pair)
        encoded = EncodeImagePrompt.execute(ip_adapter, encoder, image)
        patched = apply_prompt(model, ip_adapter, encoded.args[0], weights=weights, node="Image Prompt")
        text = " ".join([f"{pair.describe()}, weight type {weight_type!r}.", *pair.notes])
        show_on_node(cls, text)
        return io.NodeOutput(patched, ui={**encoded.ui.as_dict(), **ui.PreviewText(text).as_dict()})


def _weights(sites: Sequence[Site], weight_type: str, weight: float, use_for: str) -> tuple[LayerWeight, ...]:
    layout = weight_layout(sites)
    try:
        return layer_weights(weight_type, layout, weight, weight_composition=weight)
    except AdapterError as error:  # pruned and small models
        raise AdapterError(
            f"use_for {use_for!r} needs the layers of SD1.5 or SDXL that carry {use_for}; the connected model has "
            f"{layout} transformers before, in and after the middle block. Set use_for to {SUBJECT!r}."
        ) from error


def _load(base: nn.Module, pair: Pair) -> Loaded:
    """The pair's models, from its files when they are not those of the last runs on this model."""
    kept = _loaded.setdefault(base, {})
    key = (pair.adapter, version(pair.adapter), pair.encoder, version(pair.encoder))
    if key not in kept:
        if pair.encoder.is_dir():
            encoder = load_image_encoder(pair.encoder)
        else:
            encoder = load_encoder(pair.encoder, pair.name, pair.spec)
        loaded = load_adapter_file(pair.adapter, pair.name), encoder
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = loaded
    return kept[key]
