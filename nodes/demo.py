"""LoadIPAdapterDemo: the bundled emoji stack, so that the first workflow needs no download."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_vision
import comfy.ops
import comfy.utils
from comfy_api.latest import io

from ..ipadapter_core import load_adapter
from ..ipadapter_core.assets import MODEL, emoji_folder
from . import demo_model
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
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A UNet in the layout of SD1.5, a hundredth its size."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, of 16 tokens."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder; pictures are 64 x 64."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="The image encoder of the adapter."),
                IPAdapterModel.Output(display_name="ip_adapter", tooltip="The adapter, trained on emoji."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        root = emoji_folder()
        folder = root / MODEL
        adapter = load_adapter(root / ADAPTER, operations=comfy.ops.manual_cast)
        return io.NodeOutput(
            demo_model.load_unet(folder / "unet"),
            demo_model.load_text_encoder(folder / "text_encoder", folder / "tokenizer"),
            demo_model.load_vae(folder / "vae"),
            load_image_encoder(folder / "image_encoder"),
            manage("the emoji adapter", adapter),
        )


def load_image_encoder(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """The CLIP vision model of a diffusers folder."""
    encoder = comfy.clip_vision.ClipVisionModel(str(folder / "config.json"))
    encoder.load_sd(demo_model.read_weights(folder))
    return encoder
