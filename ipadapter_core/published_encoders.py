"""The image encoders that adapters are trained on, and that ComfyUI loads: the one table of their shapes."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

EncoderFamily = Literal["CLIP", "SigLIP", "SigLIP2", "DINOv2", "DINOv3"]
ENCODER_FAMILIES: tuple[EncoderFamily, ...] = get_args(EncoderFamily)


class PublishedEncoder(NamedTuple):
    """Fields as in `ImageEncoder`. `pixels` is the side of the images it was trained on; `download` is for messages."""

    name: str
    family: EncoderFamily
    hidden_dim: int
    embeds_dim: int | None
    layers: int
    num_tokens: int | None
    pixels: int
    download: str = ""


CLIP_L = PublishedEncoder(
    "CLIP ViT-L/14",
    "CLIP",
    1024,
    768,
    24,
    257,
    224,
    "CLIP ViT-L/14: https://huggingface.co/openai/clip-vit-large-patch14, model.safetensors",
)
CLIP_L_336 = PublishedEncoder(
    "CLIP ViT-L/14 at 336 pixels",
    "CLIP",
    1024,
    768,
    24,
    577,
    336,
    "CLIP ViT-L/14 at 336 pixels: https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus, "
    "image_encoder/pytorch_model.bin, saved as clip-vit-large-patch14-336.bin",
)
CLIP_H = PublishedEncoder(
    "CLIP ViT-H/14",
    "CLIP",
    1280,
    1024,
    32,
    257,
    224,
    "CLIP ViT-H/14: https://huggingface.co/h94/IP-Adapter, models/image_encoder/model.safetensors, saved as "
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
)
CLIP_BIGG = PublishedEncoder(
    "OpenCLIP ViT-bigG/14",
    "CLIP",
    1664,
    1280,
    48,
    257,
    224,
    "OpenCLIP ViT-bigG/14: https://huggingface.co/h94/IP-Adapter, sdxl_models/image_encoder/model.safetensors, "
    "saved as CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
)
_SIGLIP = (
    "SigLIP so400m at 384 pixels: https://huggingface.co/Comfy-Org/sigclip_vision_384, "
    "sigclip_vision_patch14_384.safetensors (or the SigLIP that the adapter was trained with)"
)
PUBLISHED_ENCODERS = (
    CLIP_L,
    CLIP_L_336,
    CLIP_H,
    CLIP_BIGG,
    PublishedEncoder("SigLIP so400m", "SigLIP", 1152, None, 27, 729, 384, _SIGLIP),
    PublishedEncoder("SigLIP so400m", "SigLIP", 1152, None, 27, 1024, 512, _SIGLIP),
    PublishedEncoder("SigLIP2 so400m NaFlex", "SigLIP2", 1152, None, 27, 256, 256, _SIGLIP),
    PublishedEncoder("DINOv2-L", "DINOv2", 1024, 1024, 24, 1370, 518),
    PublishedEncoder("DINOv2-g", "DINOv2", 1536, 1536, 40, 1370, 518),
    PublishedEncoder("DINOv3-L", "DINOv3", 1024, 1024, 24, None, 224),
    PublishedEncoder("DINOv3-H+", "DINOv3", 1280, 1280, 32, None, 1024),
)


def encoders_of_dim(dim: int, *, embeds: bool) -> list[PublishedEncoder]:
    """The encoders whose image_embeds (`embeds`) or hidden states have this dim: the CLIP models among them, if any.

    ViT-L/14's hidden states are the exception: DINOv2-L, which adapters are trained on too, has the same dim.
    """
    found = [e for e in PUBLISHED_ENCODERS if (e.embeds_dim if embeds else e.hidden_dim) == dim]
    clip = [encoder for encoder in found if encoder.family == "CLIP" and encoder is not CLIP_L_336]
    if clip == [CLIP_L] and not embeds:
        clip += [encoder for encoder in found if encoder.family == "DINOv2"]
    return clip or found


def families_named(encoder_id: str | None) -> tuple[EncoderFamily, ...]:
    """The encoder families named in a free text such as "facebook/dinov2-large"."""
    text = re.sub(r"[-_ ]", "", (encoder_id or "").lower())
    if "siglip2" in text:  # those of one resolution have SigLIP's architecture
        return ("SigLIP2", "SigLIP")
    return tuple(family for family in ENCODER_FAMILIES if family.lower() in text and family != "CLIP")
