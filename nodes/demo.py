"""LoadIPAdapterDemo and DemoImage: the bundled emoji model, so that the first workflow needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.clip_vision
import comfy.ops
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..ipadapter_core import AdapterError, AdapterSpec, load_adapter
from ..ipadapter_core.assets import MODEL, PROMPTS, emoji_folder
from ..ipadapter_core.encoders import ImageEncoder, encoder_fits, read_encoder
from . import demo_model
from .checks import check_encoder
from .files import ADAPTERS, adapter_path, adapter_spec, model_files, stamp
from .node import Node
from .types import IPAdapterModel, manage, node_schema

ADAPTER = "adapter.safetensors"
BUNDLED = "the emoji adapter"
_BUNDLED_FILES = {BUNDLED: ADAPTER, f"{BUNDLED} (base)": "adapter_base.safetensors"}
_LARGEST = 64_000_000  # bytes; adapters for so small a model are smaller, so others are not even opened


class LoadIPAdapterDemo(Node):
    """The emoji stack as ComfyUI's own objects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadIPAdapterDemo",
            display_name="Load IP Adapter Demo",
            description="Loads the small text-to-image model that comes with this pack, and its adapters. It draws "
            "emoji of 128 x 128 pixels, to try image prompts without downloads.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=[*_BUNDLED_FILES, *list_adapters()],
                    default=BUNDLED,
                    optional=True,
                    tooltip="The adapter: two come with this pack, a plus and a base adapter. One that you trained on "
                    "this model, with ipadapter demo or ipadapter train emoji-base, appears here when its file is "
                    "copied into models/ipadapter.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A UNet in the layout of SD1.5, a hundredth its size."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, of 16 tokens."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder; images are 128 x 128."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="The image encoder of the adapter."),
                IPAdapterModel.Output(display_name="ip_adapter", tooltip="The adapter, trained on emoji."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None = BUNDLED) -> str:
        """Changes when the adapter's file is replaced."""
        return str(adapter if adapter is None or adapter in _BUNDLED_FILES else stamp(ADAPTERS, adapter))

    @classmethod
    def execute(cls, adapter: str = BUNDLED) -> io.NodeOutput:
        root = emoji_folder()
        folder = root / MODEL
        path = root / _BUNDLED_FILES[adapter] if adapter in _BUNDLED_FILES else adapter_path(adapter)
        return io.NodeOutput(
            demo_model.load_unet(folder / "unet"),
            demo_model.load_text_encoder(folder / "text_encoder", folder / "tokenizer"),
            demo_model.load_vae(folder / "vae"),
            load_image_encoder(folder / "image_encoder"),
            manage(adapter, load_adapter(path, operations=comfy.ops.manual_cast)),
        )


class DemoImage(Node):
    """One of the bundled images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="DemoImage",
            display_name="Demo Image",
            has_intermediate_output=True,  # the preview survives a reload of the page
            description="One of the images that come with this pack: emoji that the demo model was not trained on.",
            inputs=[
                io.Combo.Input(
                    "image",
                    options=list_images(),
                    tooltip="The image: its subject and style. Choosing another one does not reload the model.",
                )
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="Connect to Image Prompt or Encode Image Prompt.")],
        )

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        pixels = load_image(image)
        return io.NodeOutput(pixels, ui=ui.PreviewImage(pixels, cls=cls))


def list_images() -> list[str]:
    """The names of the bundled images: what, and in which style. Empty when the files are missing, which the node
    reports when it runs.
    """
    try:
        return sorted(file.stem for file in (emoji_folder() / PROMPTS).glob("*.png"))
    except AdapterError:
        return []


@dataclass(frozen=True)
class DemoFiles:
    """The bundled adapter, and the image encoder for it and for any other that is trained on the emoji model."""

    adapter: Path
    spec: AdapterSpec
    encoder_folder: Path
    encoder: ImageEncoder

    def fits(self, spec: AdapterSpec) -> bool:
        """Whether an adapter takes what this encoder makes."""
        return spec.face_dim is None and encoder_fits(spec, self.encoder)


def demo_files() -> DemoFiles | None:
    """None when they are missing."""
    try:
        root = emoji_folder()
        folder = root / MODEL / "image_encoder"
        spec = adapter_spec(root / ADAPTER)
        encoder = read_encoder(next(folder.glob("*.safetensors")))
    except (AdapterError, OSError, StopIteration):
        return None
    return None if encoder is None else DemoFiles(root / ADAPTER, spec, folder, encoder)


def list_adapters() -> list[str]:
    """The adapters in models/ipadapter that fit the emoji model and its image encoder, by their tensors."""
    demo = demo_files()
    if demo is None:
        return []
    names: list[str] = []
    for path, name in model_files(ADAPTERS).items():
        try:
            spec = adapter_spec(path) if path.stat().st_size < _LARGEST else None
        except (AdapterError, OSError):
            continue
        if spec is None or not demo.fits(spec):
            continue
        if (spec.cross_attention_dim, spec.layer_dims) == (demo.spec.cross_attention_dim, demo.spec.layer_dims):
            names.append(name)
    return names


def load_image(name: str) -> Tensor:
    """A bundled image as an IMAGE, [1, 128, 128, 3] in 0..1.

    Raises AdapterError when there is none of this name.
    """
    names = list_images()
    if name not in names:
        emoji_folder()  # raises when all bundled files are missing
        raise AdapterError(f"There is no bundled image {name!r}. Choose one of: {', '.join(names)}.")
    with Image.open(emoji_folder() / PROMPTS / f"{name}.png") as image:
        return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255)[None]


def load_image_encoder(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """The CLIP vision model of a diffusers folder."""
    encoder = comfy.clip_vision.ClipVisionModel(str(folder / "config.json"))
    encoder.load_sd(demo_model.read_weights(folder))
    check_encoder(encoder, str(folder))
    return encoder
