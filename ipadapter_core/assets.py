"""The folder of the bundled emoji files: in a checkout, an installed wheel or ComfyUI's custom_nodes."""

from __future__ import annotations

from pathlib import Path

from .errors import AdapterError

MODEL = "emoji-model"  # the diffusers folder inside `emoji_folder()`
PROMPTS = "prompts"  # a few images that neither the model nor its adapters were trained on
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
