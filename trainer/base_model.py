"""The frozen base: every part of a text-to-image model in the SD1.5 layout, from a local diffusers folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .errors import BaseModelError
from .objective import PREDICTION_TYPES

try:  # the name without torchvision since transformers 5; before, CLIPImageProcessor was this class
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_VIT_H = "CLIP ViT-H/14"
_ENCODER_NAMES = {  # (width, layers, patch, projection) -> the name that adapters are published with
    (1280, 32, 14, 1024): _VIT_H,
    (1664, 48, 14, 1280): "OpenCLIP ViT-bigG/14",
    (1024, 24, 14, 768): "CLIP ViT-L/14",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen text-to-image model and the encoder of image prompts. The VAE is in float32."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    image_encoder: CLIPVisionModelWithProjection
    image_processor: CLIPImageProcessor

    @property
    def device(self) -> torch.device:
        """Where the UNet is; all parts are there."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet, the text encoder and the image encoder."""
        return self.unet.dtype

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return str(self.scheduler.config["prediction_type"])

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, padding included (77 for SD1.5)."""
        return min(int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))

    @property
    def latent_scale(self) -> int:
        """Pixels per latent (8 for SD1.5)."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def sample_size(self) -> int:
        """The side of the pictures that the UNet was made for, in pixels."""
        return int(self.unet.config["sample_size"]) * self.latent_scale

    @property
    def image_width(self) -> int:
        """Channels of `image_embeds`."""
        return int(self.image_encoder.config.projection_dim)

    @property
    def encoder_name(self) -> str:
        """The image encoder as people know it, or its sizes (`encoder_fingerprint` tells them apart)."""
        c = self.image_encoder.config
        shape = (c.hidden_size, c.num_hidden_layers, c.patch_size, c.projection_dim)
        sizes = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.patch_size} px patches at {c.image_size} px"
        return _ENCODER_NAMES.get(shape, f"CLIP vision encoder ({sizes}, {c.projection_dim} wide)")

    def fingerprint(self) -> str:
        """16 hex digits of the UNet's and scheduler's configs, first and last weights; fine-tunes differ."""
        digest = hashlib.sha256()
        for config in (self.unet.config, self.scheduler.config):
            public = {k: v for k, v in sorted(config.items()) if not k.startswith("_")}
            digest.update(json.dumps(public, sort_keys=True, default=str).encode())
        for module in (self.unet.conv_in, self.unet.conv_out):
            digest.update(_bytes(module.weight))
        return digest.hexdigest()[:16]

    def encoder_fingerprint(self) -> str:
        """16 hex digits of the image encoder's projection."""
        return hashlib.sha256(_bytes(self.image_encoder.visual_projection.weight)).hexdigest()[:16]


def load_base_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    image_encoder: Path | None = None,
) -> BaseModel:
    """Load every part from a local diffusers folder, frozen; nothing is downloaded.

    `dtype` is that of the UNet and the two encoders. `image_encoder` names the image encoder's folder when it
    is not `image_encoder` inside `folder`.

    Raises BaseModelError for a missing part (naming it and what was found), SDXL, an inpainting UNet, a
    prediction type other than epsilon and v_prediction, and parts that cannot be read.
    """
    folder = Path(folder)
    encoder_folder = Path(image_encoder) if image_encoder is not None else folder / "image_encoder"
    _check_folders(folder, encoder_folder)
    scheduler = _load_scheduler(folder)
    unet = _load(UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
    vae = _load(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    encoder = _load(CLIPVisionModelWithProjection, encoder_folder)
    text_encoder = _load(CLIPTextModel, folder / "text_encoder")
    if unet.config["in_channels"] != vae.config["latent_channels"]:
        raise BaseModelError(
            f"{folder}: the UNet takes {unet.config['in_channels']} channels, the VAE makes "
            f"{vae.config['latent_channels']}: an inpainting or depth model. Use the plain text-to-image model."
        )
    for module in (unet, vae, text_encoder, encoder):
        module.requires_grad_(False).eval().to(device)
    text_encoder.to(dtype)
    encoder.to(dtype)
    return BaseModel(
        name=_name(folder),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_load(CLIPTokenizer, folder / "tokenizer"),
        scheduler=scheduler,
        image_encoder=encoder,
        image_processor=_image_processor(folder, encoder_folder, int(encoder.config.image_size)),
    )


def _bytes(weight: torch.Tensor) -> bytes:
    """A weight's bytes in bfloat16, so that the precision of a run does not change a fingerprint."""
    return weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _check_folders(folder: Path, encoder_folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise BaseModelError(f"{folder}: {what}; base_model must be a local folder in the diffusers layout.")
    found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
    if (folder / "text_encoder_2").is_dir():
        raise BaseModelError(f"{folder}: an SDXL model (it has text_encoder_2), not yet supported by this version.")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise BaseModelError(f"{folder}: {part} is missing (found: {found}). Use a complete diffusers folder.")
    if not encoder_folder.is_dir():
        raise BaseModelError(
            f"{encoder_folder}: no image encoder there (found in {folder.name}: {found}). Set image_encoder to the "
            f"folder of a CLIPVisionModelWithProjection; published adapters use {_VIT_H}."
        )


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` without network; weights of the variant that is there."""
    names = [p.name for p in folder.iterdir()]
    weights = [n for n in names if n.endswith((".safetensors", ".bin"))]
    if weights and all(".fp16." in name for name in weights):
        options["variant"] = "fp16"
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(f"{folder}: cannot be read as {kind.__name__}: {reason}") from error


def _load_scheduler(folder: Path) -> DDPMScheduler:
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file}: cannot be read ({error}). Copy it from the base model again.") from error
    name, kind = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES or name.startswith("FlowMatch"):
        found = name if name.startswith("FlowMatch") else f"prediction type {kind!r}"
        raise BaseModelError(f"{file}: {found} cannot be trained; expected {' or '.join(PREDICTION_TYPES)}.")
    # The file may be any scheduler's; the noise schedule in it is what counts.
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler.from_config({k: v for k, v in config.items() if k in known})


def _image_processor(folder: Path, encoder_folder: Path, size: int) -> CLIPImageProcessor:
    """The encoder's own preprocessing, the base model's if it fits, else CLIP's at the encoder's size."""
    for candidate in (encoder_folder, folder / "feature_extractor"):
        if (candidate / "preprocessor_config.json").is_file():
            processor = _load(CLIPImageProcessor, candidate)
            if _side(processor) == size:
                return processor
            log.warning(
                "%s makes pictures of %s px, the image encoder takes %d px: ignored",
                candidate,
                _side(processor),
                size,
            )
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _side(processor: CLIPImageProcessor) -> int | None:
    crop: Any = processor.crop_size
    return crop if crop is None or isinstance(crop, int) else crop["height"]


def _name(folder: Path) -> str:
    """The folder's name, or the repository of a hub cache folder (models--owner--name/snapshots/revision)."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.parent.parent.name.removeprefix("models--").replace("--", "/")
    return resolved.name
