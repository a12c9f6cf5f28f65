"""The files of the presets of the unified loaders: by name as in the old pack, else by tensors."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import folder_paths

from ...ipadapter_core import FAMILIES, AdapterError, AdapterSpec
from ...ipadapter_core.encoders import encoder_fits
from ...ipadapter_core.spec import FAMILY_NAMES
from ..files import ADAPTERS, ENCODERS, adapter_spec, encoder_shape, list_files, main_folder, model_files, model_path
from .preset_table import PRESETS, Family, Preset

_log = logging.getLogger("ip_adapter_kit")
_ENCODERS = {
    "H": r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)\.(bin|safetensors)",
    "G": r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)\.(bin|safetensors)",
    "L": r"clip.vit.large.patch14.336\.(bin|safetensors)",
}


def family_of_context(dim: int) -> str:
    """The family of base models with this cross_attention_dim; "another" if unknown."""
    return next((family for family, (context, _) in FAMILIES.items() if context == dim), "another")


def find_preset(name: str) -> Preset:
    """Raises AdapterError for a name that begins like no preset."""
    found = [preset for start, preset in PRESETS.items() if name.lower().startswith(start)]
    if not found:
        raise AdapterError(f"Unknown preset {name!r}. Use one that begins with: {', '.join(PRESETS)}.")
    return found[0]


def find_adapter(name: str, preset: Preset, family: str) -> str:
    """The path of the adapter's file for a family of base models, "sd15", "sd2" or "sdxl".

    Raises AdapterError that names the file to download when there is none.
    """
    wanted = preset.families.get(family)
    files = list_files(ADAPTERS)
    for pattern in wanted.names if wanted else ():
        for file in files:
            if re.search(pattern, file, re.IGNORECASE):
                return str(model_path(ADAPTERS, file))
    for file in files:
        path = str(model_path(ADAPTERS, file))
        if _fits(preset, family, Path(file).name.lower(), path):
            _log.info("Preset %r: no file of its usual name; %s has the right shapes.", name, file)
            return path
    if wanted is None and family != "sd2":
        families = " and ".join(FAMILY_NAMES[key] for key in preset.families)
        raise AdapterError(f"Preset {name!r} is for {families} models. Choose another preset, or another model.")
    found = f"It holds {', '.join(files)}" if files else "It is empty"
    download = f" Download {wanted.published}." if wanted and wanted.published else ""
    raise AdapterError(
        f"No adapter for preset {name!r} and this {family} model in {main_folder(ADAPTERS)}. {found}.{download}"
    )


def _fits(preset: Preset, family: str, name: str, path: str) -> bool:
    if not all(word in name for word in preset.words) or any(word in name for word in preset.not_words):
        return False
    try:
        spec = adapter_spec(Path(path))
    except (AdapterError, OSError):
        return False
    width = preset.embeds is None or spec.image_dim == preset.embeds
    kolors = spec.is_kolors == (preset.encoder == "L")
    return spec.kind in preset.kinds and family_of_context(spec.cross_attention_dim) == family and width and kolors


def find_image_encoder(preset: Preset, spec: AdapterSpec) -> Path | None:
    """The encoder with the preset's usual name if it fits, else any that fits."""
    files = model_files(ENCODERS)
    usual = [path for path, name in files.items() if re.search(_ENCODERS[preset.encoder], name, re.IGNORECASE)]
    for path in [*usual, *files]:
        try:
            encoder = encoder_shape(path)
        except (AdapterError, OSError):
            continue
        if encoder is not None and encoder_fits(spec, encoder):
            return path
    return None


def find_lora(preset: Preset, family: str) -> str | None:
    """The path of the FaceID LoRA's own file; None without one."""
    found = _loras(preset.families[family]) if family in preset.families else []
    return str(model_path("loras", found[0])) if found else None


def lora_files(name: str) -> list[str]:
    """The LoRA files that the preset of this name may mean, for any family; none for an unknown name."""
    presets = [preset for start, preset in PRESETS.items() if name.lower().startswith(start)][:1]
    return [file for preset in presets for family in preset.families.values() for file in _loras(family)]


def _loras(family: Family) -> list[str]:
    if family.lora is None:
        return []
    return [file for file in folder_paths.get_filename_list("loras") if re.search(family.lora, file, re.IGNORECASE)]
