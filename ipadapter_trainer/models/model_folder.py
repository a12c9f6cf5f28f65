"""A text-to-image model as a diffusers folder: what it is, from its configs, and its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import BaseModelError
from .parts import chosen_weights, load_part, load_tokenizer, read_json
from .weight_files import PAGE, check_header, weights_fingerprint
from .weight_names import WEIGHT_SUFFIXES

FAMILIES = "SD1.5, SD2 and SDXL"
_REFUSED = {  # in model_index.json's _class_name -> the name to refuse
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "FLUX",
    "Kolors": "Kolors",
    "StableCascade": "Stable Cascade",
    "Inpaint": "an inpainting model",
    "Refiner": "the SDXL refiner",
}
TIME_IDS = 6  # SDXL: (height, width), (top, left), (height, width)
_EXPECTED = (
    "Set base_model to a folder in the diffusers layout, a .safetensors checkpoint or a Hub id such as "
    "stable-diffusion-v1-5/stable-diffusion-v1-5; `ipadapter models` lists models to download."
)
_EXPECTED_CONFIGS = "Set base_config to a folder in the diffusers layout; its weights are not needed."
PREDICTION_TYPES = ("epsilon", "v_prediction")


class ModelFolder:
    """A diffusers folder whose configs, tokenizers and scheduler are read; the weights wait for `load_*`.

    With `needs_weights` False the folder lends its configs and tokenizers to weights from elsewhere.

    Raises BaseModelError for a missing part, naming it and what was found, and for models that cannot be trained:
    diffusion transformers (SD3, FLUX), Kolors, the SDXL refiner, inpainting and depth models, unCLIP, flow matching,
    and prediction types other than epsilon and v_prediction.
    """

    def __init__(self, folder: Path, needs_weights: bool = True) -> None:
        self.folder = folder
        self._check_parts(needs_weights)
        self.unet_config = _config(UNet2DConditionModel, folder / "unet")
        self.vae_config = _config(AutoencoderKL, folder / "vae")
        self.is_sdxl = self.unet_config["addition_embed_type"] == "text_time"
        encoders = ("text_encoder", "text_encoder_2") if self.is_sdxl else ("text_encoder",)
        self.parts = ("unet", "vae", *encoders)
        for part in (*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders)):
            self._check_part(part)
        self.text_configs = tuple(_text_config(folder / part) for part in encoders)
        check_configs(str(folder), self.unet_config, self.vae_config, self.text_configs)
        if needs_weights:
            for part in self.parts:
                for file in chosen_weights(folder / part).files:
                    check_header(file, f"{part} weights")
        self.scheduler_config, self.scheduler = _read_scheduler(folder)
        self.tokenizers: tuple[CLIPTokenizer, ...] = tuple(
            load_tokenizer(folder / part.replace("text_encoder", "tokenizer"), int(config.vocab_size))
            for part, config in zip(encoders, self.text_configs, strict=True)
        )

    @property
    def name(self) -> str:
        """The folder's name, or the repository of a hub cache folder (models--owner--name/snapshots/revision)."""
        resolved = self.folder.resolve()
        if resolved.parent.name == "snapshots":
            return resolved.parent.parent.name.removeprefix("models--").replace("--", "/")
        return resolved.name

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Read the UNet."""
        return self._load(UNet2DConditionModel, "unet", torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Read the VAE."""
        return self._load(AutoencoderKL, "vae", torch_dtype=dtype)

    def load_text_encoders(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Read the text encoders, one or two."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        loaded = zip(kinds, self.parts[2:], strict=False)
        return tuple(self._load(kind, part).to(dtype) for kind, part in loaded)

    def fingerprint(self, part: str) -> str:
        """A digest of the weights of "unet", "vae" or "text_encoders", read from the files."""
        names = self.parts[2:] if part == "text_encoders" else (part,)
        return "".join(weights_fingerprint(chosen_weights(self.folder / name).files) for name in names)

    def _load(self, kind: Any, part: str, **options: Any) -> Any:
        return load_part(kind, self.folder / part, **options)

    def _check_parts(self, needs_weights: bool) -> None:
        folder = self.folder
        if not folder.is_dir():
            missing = "no such file" if folder.suffix in WEIGHT_SUFFIXES else "no such folder"
            what = "a file, but no .safetensors" if folder.exists() else missing
            raise BaseModelError(f"{folder}: {what}. {_EXPECTED if needs_weights else _EXPECTED_CONFIGS}")
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        pipeline = str(index.get("_class_name", ""))
        refiner = bool(index.get("requires_aesthetics_score")) or (
            (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir()
        )
        refused = next((name for word, name in _REFUSED.items() if word in pipeline), None)
        if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
            refused = refused or "a diffusion transformer"
        if refused or refiner:
            says = f" (its pipeline is {pipeline})" if pipeline else ""
            raise BaseModelError(
                f"{folder}: {refused or 'the SDXL refiner'}{says}, which this version cannot train. Use {FAMILIES} "
                "text-to-image models."
            )
        for part in ("unet", "vae", "scheduler"):
            self._check_part(part)

    def _check_part(self, part: str) -> None:
        if not (self.folder / part).is_dir():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.is_dir())) or "no folders"
            raise BaseModelError(f"{self.folder}: {part} is missing (found: {found}). Use a complete diffusers folder.")


def check_configs(
    origin: str, unet: Mapping[str, Any], vae: Mapping[str, Any], texts: tuple[CLIPTextConfig, ...]
) -> None:
    """Refuse models whose UNet takes more than noisy latents, a timestep, text and SDXL's time ids.

    Raises BaseModelError.
    """
    if unet["in_channels"] != vae["latent_channels"]:
        raise BaseModelError(
            f"{origin}: the UNet takes {unet['in_channels']} channels, the VAE makes {vae['latent_channels']}: an "
            "inpainting, depth or editing model. Use the plain text-to-image model."
        )
    known = {"addition_embed_type": (None, "text_time")}
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type"):
        if unet[key] not in known.get(key, (None,)):
            raise BaseModelError(
                f"{origin}: the UNet has {key} = {unet[key]!r}: an unCLIP, upscaling or image-conditioned model. Use "
                f"{FAMILIES} text-to-image models."
            )
    if vae.get("latents_mean") is not None:
        raise BaseModelError(
            f"{origin}: the VAE's latents are normalised per channel (Playground v2.5), which this version cannot "
            f"train. Use {FAMILIES} models."
        )
    width = sum(text.hidden_size for text in texts)
    if width != unet["cross_attention_dim"]:
        raise BaseModelError(
            f"{origin}: the text encoders make states of {width}, the UNet takes {unet['cross_attention_dim']}. The "
            "parts belong to different models."
        )
    if unet["addition_embed_type"] is not None:
        ids = unet["projection_class_embeddings_input_dim"] - int(texts[-1].projection_dim)
        if ids != TIME_IDS * unet["addition_time_embed_dim"]:
            raise BaseModelError(
                f"{origin}: the UNet takes {ids / unet['addition_time_embed_dim']:g} time ids, SDXL's base model "
                f"{TIME_IDS}: a refiner or another model. Use the SDXL base model or a fine-tune of it."
            )


def new_scheduler(config: Mapping[str, Any], **changes: Any) -> DDPMScheduler:
    """The noise schedule of any scheduler's config: which solver the file names does not count."""
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler.from_config({k: v for k, v in {**config, **changes}.items() if k in known})


def _read_scheduler(folder: Path) -> tuple[dict[str, Any], DDPMScheduler]:
    """The config, and its noise schedule."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    _check_class(file, config, "Scheduler")
    name, kind = str(config["_class_name"]), config.get("prediction_type", "epsilon")
    foreign = name.startswith(("FlowMatch", "EDM"))
    if kind not in PREDICTION_TYPES or foreign:
        found = name if foreign else f"prediction type {kind!r}"
        raise BaseModelError(f"{file}: {found} cannot be trained; expected {' or '.join(PREDICTION_TYPES)}.")
    try:
        return config, new_scheduler(config)
    except Exception as error:  # values of a wrong type or range, whatever diffusers makes of them
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(f"{file}: no noise schedule ({reason}). Download it again from {PAGE}.") from error


def _config(kind: Any, folder: Path) -> dict[str, Any]:
    """A part's config with the defaults of what it leaves out, without its weights."""
    given = read_json(folder / "config.json")
    _check_class(folder / "config.json", given, kind.__name__)
    parameters = inspect.signature(kind.__init__).parameters
    return {**{k: p.default for k, p in parameters.items() if p.default is not p.empty}, **given}


def _check_class(file: Path, config: Mapping[str, Any], expected: str) -> None:
    """Refuse the config of another class: what it leaves out would be filled in with defaults."""
    found = config.get("_class_name", config.get("model_type", "no class"))
    if not str(found).endswith(expected):
        raise BaseModelError(f"{file}: a config of {found}; expected one of {expected}. Download it again from {PAGE}.")


def _text_config(folder: Path) -> CLIPTextConfig:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in ("clip_text_model", "clip"):
        raise BaseModelError(
            f"{folder}: a text encoder of the type {model_type!r}; expected CLIP's. Use {FAMILIES} models."
        )
    return load_part(CLIPTextConfig, folder)
