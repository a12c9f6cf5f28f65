"""The folder of the bundled emoji files: in a checkout, an installed wheel or ComfyUI's custom_nodes."""

from __future__ import annotations

from pathlib import Path

from .errors import AdapterError
from .spec import AdapterSpec

MODEL = "emoji-model"  # the diffusers folder inside `emoji_folder()`
PROMPTS = "prompts"  # a few images that neither the model nor its adapters were trained on
# What the files of adapters for the emoji model say: the name that the trainer gives its image encoder, the channels of
# its features, and those of the UNet's context and cross-attention layers.
_ENCODER = "CLIP vision encoder (5 layers of 160, 16 px patches at 128 px, 128 wide)"
_IMAGE_EMBEDS, _HIDDEN_STATES = 128, 160
_CONTEXT, _LAYERS = 128, (64,) * 2 + (96,) * 2 + (128,) * 5 + (96,) * 3 + (64,) * 3 + (128,)
_FOLDERS = ("assets", "ipadapter_assets")  # next to this package: in a checkout or custom_nodes, from a wheel


def emoji_folder() -> Path:
    """The folder with the emoji model, its adapters and its images.

    Raises AdapterError when it is missing.
    """
    parent = Path(__file__).resolve().parent.parent
    for name in _FOLDERS:
        folder = parent / name / "emoji"
        if folder.is_dir():
            return folder
    tried = " and ".join(str(parent / name / "emoji") for name in _FOLDERS)
    raise AdapterError(f"The bundled emoji files are missing: looked for {tried}. Install the package again.")


def is_for_emoji(spec: AdapterSpec) -> bool:
    """Whether an adapter was trained on the emoji model: by its dims, and its encoder's name where the file has it."""
    features = _IMAGE_EMBEDS if spec.kind == "base" else _HIDDEN_STATES
    dims = (spec.image_dim, spec.cross_attention_dim, spec.layer_dims)
    return dims == (features, _CONTEXT, _LAYERS) and spec.encoder_id in (None, _ENCODER)
