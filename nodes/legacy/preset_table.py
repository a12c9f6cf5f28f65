"""The presets of the unified loaders: which files each of them means, for each family of base models."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import H94

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
