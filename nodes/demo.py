"""LoadIPAdapterDemo: the bundled emoji stack, so that the first workflow needs no download."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_vision
import comfy.ops
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..ipadapter_core import AdapterError, load_adapter
from ..ipadapter_core.assets import MODEL, PROMPTS, emoji_folder
from . import demo_model
from .checks import check_encoder
from .types import IPAdapterModel, manage, node_schema

ADAPTER = "adapter.safetensors"


class LoadIPAdapterDemo(io.ComfyNode):
    """The emoji stack as ComfyUI's own objects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadIPAdapterDemo",
            display_name="Load IP Adapter Demo",
            description="Loads the small text-to-image model that comes with this pack, and its adapter. It draws "
            "emoji of 64 x 64 pixels: enough to see what an image prompt does, with nothing to download.",
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=list_pictures(),
                    optional=True,
                    tooltip="The picture to give out as image. The model has seen none of them, nor their concepts.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A UNet in the layout of SD1.5, a hundredth its size."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, of 16 tokens."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder; pictures are 64 x 64."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="The image encoder of the adapter."),
                IPAdapterModel.Output(display_name="ip_adapter", tooltip="The adapter, trained on emoji."),
                io.Image.Output(display_name="image", tooltip="The chosen picture, for Encode Image Prompt."),
            ],
        )

    @classmethod
    def execute(cls, picture: str | None = None) -> io.NodeOutput:
        root = emoji_folder()
        folder = root / MODEL
        adapter = load_adapter(root / ADAPTER, operations=comfy.ops.manual_cast)
        return io.NodeOutput(
            demo_model.load_unet(folder / "unet"),
            demo_model.load_text_encoder(folder / "text_encoder", folder / "tokenizer"),
            demo_model.load_vae(folder / "vae"),
            load_image_encoder(folder / "image_encoder"),
            manage("the emoji adapter", adapter),
            load_picture(picture or next(iter(list_pictures()), "")),
        )


def list_pictures() -> list[str]:
    """The names of the bundled pictures: what, and in which style. None when the bundled files are missing: that is
    said when the node runs, and is no reason for the other nodes not to load.
    """
    try:
        return sorted(file.stem for file in (emoji_folder() / PROMPTS).glob("*.png"))
    except AdapterError:
        return []


def load_picture(name: str) -> Tensor:
    """A bundled picture as an IMAGE, [1, 64, 64, 3] in 0..1.

    Raises AdapterError when there is none of this name.
    """
    names = list_pictures()
    if name not in names:
        raise AdapterError(f"There is no bundled picture {name!r}. Choose one of: {', '.join(names)}.")
    with Image.open(emoji_folder() / PROMPTS / f"{name}.png") as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def load_image_encoder(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """The CLIP vision model of a diffusers folder."""
    encoder = comfy.clip_vision.ClipVisionModel(str(folder / "config.json"))
    encoder.load_sd(demo_model.read_weights(folder))
    check_encoder(encoder, str(folder))
    return encoder
