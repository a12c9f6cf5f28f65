"""A base model as a diffusers folder: its configs, and the models that are refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from ..errors import BaseModelError
from .model_config import ModelConfig
from .parts import from_config, load_part, load_tokenizer, read_json, weight_files
from .weight_files import PAGE, check_header
from .weight_names import WEIGHT_SUFFIXES

FAMILIES = "SD1.5, SD2 and SDXL"
_REFINER = "the SDXL refiner"
_REFUSED = {  # in model_index.json's _class_name -> the name to refuse
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "FLUX",
    "Kolors": "Kolors",
    "StableCascade": "Stable Cascade",
    "Inpaint": "an inpainting model",
    "Refiner": _REFINER,
}
TIME_IDS = 6  # SDXL: (height, width), (top, left), (height, width)
_EXPECTED = (
    "Set base_model to a folder in the diffusers layout, a .safetensors checkpoint or a Hub id such as "
    "stable-diffusion-v1-5/stable-diffusion-v1-5; `ipadapter models` lists models to download."
)
_EXPECTED_CONFIGS = "Set base_config to a folder in the diffusers layout; its weights are not needed."
PREDICTION_TYPES = ("epsilon", "v_prediction")


def read_folder(folder: Path, prediction_type: str | None = None, *, needs_weights: bool = True) -> ModelConfig:
    """Read the configs, tokenizers and scheduler of a diffusers folder.

    With `needs_weights` False, the folder is used for its configs and tokenizers alone.

    Raises BaseModelError for a missing part, naming it and what was found, for a scheduler of another
    `prediction_type`, and for models that cannot be trained: diffusion transformers (SD3, FLUX), Kolors, the SDXL
    refiner, inpainting and depth models, unCLIP, flow matching, and prediction types other than epsilon and
    v_prediction.
    """
    _check_pipeline(folder, _EXPECTED if needs_weights else _EXPECTED_CONFIGS)
    _check_parts(folder, "unet", "vae", "scheduler")
    unet, vae = _config(UNet2DConditionModel, folder / "unet"), _config(AutoencoderKL, folder / "vae")
    suffixes = ("", "_2") if unet["addition_embed_type"] == "text_time" else ("",)
    text_parts = tuple(f"text_encoder{suffix}" for suffix in suffixes)
    _check_parts(folder, *text_parts, *(f"tokenizer{suffix}" for suffix in suffixes))
    texts = tuple(_text_config(folder / part) for part in text_parts)
    check_configs(str(folder), unet, vae, texts)
    if needs_weights:
        for part in ("unet", "vae", *text_parts):
            for file in weight_files(folder / part):
                check_header(file, f"{part} weights")
    scheduler = _read_scheduler(folder)
    found = scheduler.config["prediction_type"]
    if prediction_type not in (None, found):
        raise BaseModelError(
            f"prediction_type is {prediction_type!r}, the scheduler of {folder} has {found!r}. Leave it out, or "
            "correct scheduler/scheduler_config.json."
        )
    tokenizers = tuple(
        load_tokenizer(folder / f"tokenizer{suffix}", int(text.vocab_size))
        for suffix, text in zip(suffixes, texts, strict=True)
    )
    return ModelConfig(_name(folder), folder, unet, vae, texts, tokenizers, scheduler)


def _name(folder: Path) -> str:
    """The folder's name, or the repository of a Hub cache folder (models--owner--name/snapshots/revision)."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.parent.parent.name.removeprefix("models--").replace("--", "/")
    return resolved.name


def _check_pipeline(folder: Path, expected: str) -> None:
    if not folder.is_dir():
        missing = "no such file" if folder.suffix in WEIGHT_SUFFIXES else "no such folder"
        what = "a file, but no .safetensors" if folder.exists() else missing
        raise BaseModelError(f"{folder}: {what}. {expected}")
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    refused = next((name for word, name in _REFUSED.items() if word in pipeline), None)
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        refused = refused or "a diffusion transformer"
    if (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir():
        refused = refused or _REFINER
    if index.get("requires_aesthetics_score"):
        refused = refused or _REFINER
    if refused:
        named = f" (its pipeline is {pipeline})" if pipeline else ""
        raise BaseModelError(
            f"{folder}: {refused}{named}, which this version cannot train. Use {FAMILIES} text-to-image models."
        )


def _check_parts(folder: Path, *parts: str) -> None:
    for part in parts:
        if not (folder / part).is_dir():
            found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
            raise BaseModelError(f"{folder}: {part} is missing (found: {found}). Use a complete diffusers folder.")


def check_configs(origin: str, unet: Mapping[str, Any], vae: Mapping[str, Any], texts: tuple[Any, ...]) -> None:
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
    """The noise schedule of any scheduler's config; its solver is of no use in training."""
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return from_config(DDPMScheduler, {k: v for k, v in {**config, **changes}.items() if k in known})


def _read_scheduler(folder: Path) -> DDPMScheduler:
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    _check_class(file, config, "Scheduler")
    name, kind = str(config["_class_name"]), config.get("prediction_type", "epsilon")
    foreign = name.startswith(("FlowMatch", "EDM"))
    if kind not in PREDICTION_TYPES or foreign:
        found = name if foreign else f"prediction type {kind!r}"
        raise BaseModelError(f"{file}: {found} cannot be trained; expected {' or '.join(PREDICTION_TYPES)}.")
    try:
        return new_scheduler(config)
    except Exception as error:  # values of a wrong type or range, whatever diffusers makes of them
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(f"{file}: no noise schedule ({reason}). Download it again from {PAGE}.") from error


def _config(kind: Any, folder: Path) -> dict[str, Any]:
    """A part's config, with the defaults of what it leaves out."""
    given = read_json(folder / "config.json")
    _check_class(folder / "config.json", given, kind.__name__)
    parameters = inspect.signature(kind.__init__).parameters
    return {**{k: p.default for k, p in parameters.items() if p.default is not p.empty}, **given}


def _check_class(file: Path, config: Mapping[str, Any], expected: str) -> None:
    """Refuse the config of another class, which would be filled up with defaults."""
    found = config.get("_class_name", config.get("model_type", "no class"))
    if not str(found).endswith(expected):
        raise BaseModelError(f"{file}: a config of {found}; expected one of {expected}. Download it again from {PAGE}.")


def _text_config(folder: Path) -> Any:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in ("clip_text_model", "clip"):
        raise BaseModelError(
            f"{folder}: a text encoder of the type {model_type!r}; expected CLIP's. Use {FAMILIES} models."
        )
    return load_part(CLIPTextConfig, folder)
