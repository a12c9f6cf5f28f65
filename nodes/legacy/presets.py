"""The presets of the unified loaders and their files: by name as in the old pack, else by tensors."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...ipadapter_core import AdapterError, AdapterSpec
from ...ipadapter_core.encoders import encoder_fits
from ..files import (
    ADAPTERS,
    ENCODERS,
    H94,
    adapter_spec,
    encoder_shape,
    list_files,
    main_folder,
    model_files,
    model_path,
)

_log = logging.getLogger("ip_adapter_kit")
_FACEID = "https://huggingface.co/h94/IP-Adapter-FaceID"


@dataclass(frozen=True)
class Family:
    """What a preset means for one family of base models: patterns of the adapter's file name, the best first, the
    pattern of its LoRA's, and a published file.
    """

    names: tuple[str, ...]
    lora: str | None = None
    published: str = ""


@dataclass(frozen=True)
class Preset:
    """What a preset looks for. `kinds`, `embeds` (the width of image_embeds) and `words` find a file whose name says
    something else; `words` are in its name, `not_words` are not.
    """

    families: dict[str, Family]
    kinds: tuple[str, ...]
    embeds: int | None = None
    words: tuple[str, ...] = ()
    not_words: tuple[str, ...] = ("face", "composition", "light")
    encoder: str = "H"
    faces: bool = False


_ENCODERS = {
    "H": r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)\.(bin|safetensors)",
    "G": r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)\.(bin|safetensors)",
    "L": r"clip.vit.large.patch14.336\.(bin|safetensors)",
}


def _named(*stems: str, lora: str | None = None, published: str = "") -> Family:
    names = tuple(rf"{stem}\.(safetensors|bin)$" for stem in stems)
    return Family(names, None if lora is None else rf"{lora}\.safetensors$", published)


def _faceid(stem: str, published: str) -> Family:
    return _named(stem, lora=rf"{stem}.lora", published=f"{_FACEID}, {published}.bin and {published}_lora.safetensors")


# By the beginning of the preset, in lower case. Other packs and hosts use some that the widgets do not have.
PRESETS: dict[str, Preset] = {
    "light": Preset(
        {"sd15": _named("sd15.light.v11", "sd15.light", published=f"{H94}, models/ip-adapter_sd15_light_v11.bin")},
        ("base",),
        1024,
        words=("light",),
        not_words=(),
    ),
    "standard": Preset(
        {
            "sd15": _named("ip.adapter.sd15", published=f"{H94}, models/ip-adapter_sd15.safetensors"),
            "sdxl": _named("ip.adapter.sdxl.vit.h", published=f"{H94}, sdxl_models/ip-adapter_sdxl_vit-h.safetensors"),
        },
        ("base",),
        1024,
    ),
    "vit-g": Preset(
        {
            "sd15": _named("sd15.vit.g", published=f"{H94}, models/ip-adapter_sd15_vit-G.safetensors"),
            "sdxl": _named("ip.adapter.sdxl", published=f"{H94}, sdxl_models/ip-adapter_sdxl.safetensors"),
        },
        ("base",),
        1280,
        encoder="G",
    ),
    "plus (kolors": Preset({"sdxl": _named("ip.adapter.plus.general", "plus.gener(nal|al)")}, ("plus",), encoder="L"),
    "plus (": Preset(
        {
            "sd15": _named("ip.adapter.plus.sd15", published=f"{H94}, models/ip-adapter-plus_sd15.safetensors"),
            "sdxl": _named("plus.sdxl.vit.h", published=f"{H94}, sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"),
        },
        ("plus",),
    ),
    "plus face": Preset(
        {
            "sd15": _named("plus.face.sd15", published=f"{H94}, models/ip-adapter-plus-face_sd15.safetensors"),
            "sdxl": _named(
                "plus.face.sdxl.vit.h", published=f"{H94}, sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors"
            ),
        },
        ("plus",),
        words=("face",),
        not_words=(),
    ),
    "full": Preset(
        {"sd15": _named("full.face.sd15", published=f"{H94}, models/ip-adapter-full-face_sd15.safetensors")},
        ("full",),
        not_words=(),
    ),
    "faceid portrait unnorm": Preset(
        {"sdxl": _named("portrait.sdxl.unnorm", published=f"{_FACEID}, ip-adapter-faceid-portrait_sdxl_unnorm.bin")},
        ("portrait",),
        words=("unnorm",),
        not_words=(),
        faces=True,
    ),
    "faceid portrait": Preset(
        {
            "sd15": _named(
                "portrait.v11.sd15", "portrait.sd15", published=f"{_FACEID}, ip-adapter-faceid-portrait-v11_sd15.bin"
            ),
            "sdxl": _named("portrait.sdxl", published=f"{_FACEID}, ip-adapter-faceid-portrait_sdxl.bin"),
        },
        ("portrait",),
        not_words=("unnorm",),
        faces=True,
    ),
    "faceid plus v2": Preset(
        {
            "sd15": _faceid("faceid.plusv2.sd15", "ip-adapter-faceid-plusv2_sd15"),
            "sdxl": _faceid("faceid.plusv2.sdxl", "ip-adapter-faceid-plusv2_sdxl"),
        },
        ("faceid-plus",),
        words=("v2",),
        not_words=(),
        faces=True,
    ),
    "faceid plus": Preset(
        {"sd15": _faceid("faceid.plus.sd15", "ip-adapter-faceid-plus_sd15")},
        ("faceid-plus",),
        not_words=("v2",),
        faces=True,
    ),
    "faceid": Preset(
        {
            "sd15": _faceid("faceid.sd15", "ip-adapter-faceid_sd15"),
            "sdxl": _faceid("faceid.sdxl", "ip-adapter-faceid_sdxl"),
        },
        ("faceid",),
        not_words=(),
        faces=True,
    ),
    "composition": Preset(
        {
            "sd15": _named("plus.composition.sd15", published="https://huggingface.co/ostris/ip-composition-adapter"),
            "sdxl": _named("plus.composition.sdxl", published="https://huggingface.co/ostris/ip-composition-adapter"),
        },
        ("plus",),
        words=("composition",),
        not_words=(),
    ),
    "kolors": Preset(
        {
            "sdxl": _named(
                "ip_adapter_plus_general",
                "kolors.ip.adapter.plus",
                published="https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus, ip_adapter_plus_general.bin",
            )
        },
        ("plus",),
        encoder="L",
    ),
}


def family_of_context(dim: int) -> str:
    """The family of base models with this cross_attention_dim; "another" if unknown."""
    return {768: "sd15", 1024: "sd2", 2048: "sdxl"}.get(dim, "another")


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
        families = " and ".join({"sd15": "SD1.5", "sdxl": "SDXL"}[key] for key in preset.families)
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
