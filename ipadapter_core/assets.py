"""Where the bundled emoji files are: in a checkout, in an installed wheel and under ComfyUI's custom_nodes alike."""

from __future__ import annotations

from pathlib import Path

from .errors import AdapterError

# In a checkout and under custom_nodes `assets` lies beside this package; a wheel installs it as `ipadapter_assets`.
MODEL = "emoji-model"  # the diffusers folder inside `emoji_folder()`
PROMPTS = "prompts"  # a few images beside it that no part of it was trained on
_FOLDERS = ("assets", "ipadapter_assets")


def emoji_folder() -> Path:
    """The folder with the emoji model, its adapter and its images.

    Raises AdapterError naming the places looked at when the installation lacks it.
    """
    beside = Path(__file__).resolve().parent.parent
    for name in _FOLDERS:
        folder = beside / name / "emoji"
        if folder.is_dir():
            return folder
    tried = " and ".join(str(beside / name / "emoji") for name in _FOLDERS)
    raise AdapterError(f"The bundled emoji files are missing: looked for {tried}. Install the package again.")
