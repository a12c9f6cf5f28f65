"""A base model as one .safetensors file in the original layout (LDM for SD1.5 and SD2, SGM for SDXL)."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

from ipadapter_core import FAMILY_NAMES, looks_like
from ipadapter_core.layouts import FULL_CHECKPOINT
from ipadapter_core.tensors import TensorFile

from ..errors import BaseModelError
from .hub import cached_snapshot, hub_reason
from .model_config import PARTS, ModelConfig
from .model_folder import FAMILIES, new_scheduler, read_folder
from .parts import check_values, quiet_libraries
from .published_models import repository_of
from .weight_files import PAGE, open_weights

Family = Literal["sd15", "sd2", "sdxl"]

_UNET = PARTS["unet"].prefixes[0]
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_REPOSITORIES: dict[Family, str] = {
    "sd15": repository_of("stable-diffusion-v1-5"),
    "sd2": repository_of("stable-diffusion-2-1"),
    "sdxl": repository_of("stable-diffusion-xl-base-1.0"),
}
_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt"]
_INPUTS = {5: "a depth model", 7: "an upscaler", 8: "an editing model (InstructPix2Pix)", 9: "an inpainting model"}
_STATED = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# This bias of SD2's UNet is widely spread in v-prediction models only (ComfyUI's rule).
_SD2_BIAS, _SD2_SPREAD = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

log = logging.getLogger(__name__)


def read_single_file(path: Path, base_config: Path | None = None, prediction_type: str | None = None) -> ModelConfig:
    """Read a checkpoint's header; its weights are read by `load_from_checkpoint`.

    Configs and tokenizers come from `base_config`, a diffusers folder of the same family, or from the repository of
    the family's base model (in the Hub's cache, else downloaded). The prediction type is the file's own (a `v_pred`
    tensor, `modelspec.prediction_type` in its metadata), else `prediction_type`, else that of the scheduler of
    `base_config`. A `ztsnr` tensor asks for a noise schedule with zero terminal SNR.

    Raises BaseModelError for other files, saying what they are, for a file without VAE or text encoder, for a
    `base_config` of another family and for a `prediction_type` that contradicts the file.
    """
    file = open_weights(path, f"a checkpoint of {FAMILIES}")
    family = checkpoint_family(file, str(path))
    folder = hub_configs(family, path) if base_config is None else Path(base_config)
    config = read_folder(folder, needs_weights=False)
    to_k = next(t for n, t in file.infos.items() if n.startswith(_UNET) and n.endswith("attn2.to_k.weight"))
    found, wanted = to_k.shape[-1], config.unet["cross_attention_dim"]
    if found != wanted or config.is_sdxl != (family == "sdxl"):
        raise BaseModelError(
            f"{path}: a {FAMILY_NAMES[family]} model (context {found}), but base_config {folder} is for a context of "
            f"{wanted}. Use a folder of the same family."
        )
    scheduler = _scheduler(file, path, config.scheduler, family, prediction_type)
    return replace(config, name=path.stem, checkpoint=path, scheduler=scheduler)


def load_from_checkpoint(config: ModelConfig, part: str, dtype: torch.dtype) -> Any:
    """Load a part of a single file; of two UNets, the one that is not an average (EMA), as every host does.

    Raises BaseModelError when its tensors do not fit the config, or some are missing.
    """
    path, kind = config.checkpoint, PARTS[part].kind
    options: dict[str, Any] = {"config": str(config.folder), "subfolder": part, "local_files_only": True}
    assert path is not None
    opened = open_weights(path)
    state = {name: opened.read(name) for name in opened.infos if name.startswith(PARTS[part].prefixes)}
    if part in config.text_parts:
        # What StableDiffusionPipeline.from_single_file calls for this part.
        state = {_clip_name(name): tensor for name, tensor in state.items() if "position_ids" not in name}
        load: Any = partial(create_diffusers_clip_model_from_ldm, kind, state)
    else:
        load = partial(kind.from_single_file, state)
    try:
        with quiet_libraries():  # they warn of every change of dtype, even when they make it themselves
            network = load(**options, torch_dtype=dtype).to("cpu")
    except NotImplementedError as error:  # tensors without data were left, and cannot be moved
        raise BaseModelError(
            f"{path}: its {part} is incomplete: tensors that the config in {config.folder} asks for are missing. "
            f"Download it again from {PAGE}, or use the base_config of its family."
        ) from error
    except Exception as error:  # of any class, from three libraries
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(f"{path}: its {part} does not fit the config in {config.folder}: {reason}") from error
    check_values(network, f"{path}, {part}")
    return network


def checkpoint_family(file: TensorFile, origin: str) -> Family:
    """The family of a checkpoint, from its tensors' names and shapes; `origin` is for errors.

    Raises BaseModelError for anything but a whole SD1.5, SD2 or SDXL text-to-image model, saying what it is.
    """
    found = looks_like(file.infos)
    if found != FULL_CHECKPOINT or _CONV_IN not in file.infos:
        raise BaseModelError(
            f"{origin}: looks like {found}, not a checkpoint that can be trained on. Use a whole {FAMILIES} checkpoint "
            "in the original layout, or a diffusers folder."
        )
    is_sdxl = _has(file, "conditioner.embedders.1.")
    if _has(file, "conditioner.embedders.0.model.") and not is_sdxl:
        raise BaseModelError(f"{origin}: the SDXL refiner, which takes no image prompts. Use the SDXL base model.")
    channels = file.infos[_CONV_IN].shape[1]
    if channels in _INPUTS:
        raise BaseModelError(
            f"{origin}: the UNet takes {channels} channels: {_INPUTS[channels]}. Use the plain text-to-image model."
        )
    for what, part in (("VAE", "vae"), ("text encoder", "text_encoder")):
        prefixes = PARTS[part].prefixes
        if not _has(file, *prefixes):
            raise BaseModelError(
                f"{origin}: has a UNet but no {what} (no tensor starts with {prefixes[0]!r}). Use a whole checkpoint, "
                "or a diffusers folder."
            )
    if is_sdxl:
        return "sdxl"
    return "sd2" if _has(file, "cond_stage_model.model.") else "sd15"


def _has(file: TensorFile, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in file.infos)


def _scheduler(
    file: TensorFile, path: Path, configured: DDPMScheduler, family: Family, prediction_type: str | None
) -> DDPMScheduler:
    """The noise schedule of the configs, with the prediction type and zero terminal SNR of the file."""
    stated = _STATED.get(str(file.metadata.get("modelspec.prediction_type", "")).lower())
    if "v_pred" in file.infos:
        stated = "v_prediction"
    if stated and prediction_type not in (None, stated):
        raise BaseModelError(f"prediction_type is {prediction_type!r}, {path} has {stated!r}. Leave it out.")
    target = stated or prediction_type or str(configured.config["prediction_type"])
    if family == "sd2" and stated is None and prediction_type is None and _SD2_BIAS in file.infos:
        spread = file.read(_SD2_BIAS).float().std(correction=0)
        likely = "v_prediction" if spread > _SD2_SPREAD else "epsilon"
        if likely != target:
            log.warning(
                "%s: the config has %s, the weights look like %s. Set prediction_type when the config is wrong.",
                path,
                target,
                likely,
            )
    changes = {"rescale_betas_zero_snr": True} if "ztsnr" in file.infos else {}
    return new_scheduler(configured.config, prediction_type=target, **changes)


def hub_configs(family: Family, origin: Path) -> Path:
    """The configs and tokenizers of a family's base model, from the Hub's cache, else downloaded.

    Raises BaseModelError when neither works.
    """
    from huggingface_hub import snapshot_download

    repository = _REPOSITORIES[family]
    cached = cached_snapshot(repository)
    if cached is not None and (cached / "unet" / "config.json").is_file() and (cached / "tokenizer").is_dir():
        return cached
    try:
        return Path(snapshot_download(repository, allow_patterns=_CONFIG_FILES))
    except Exception as error:  # which classes huggingface_hub and its network library raise differs by version
        raise BaseModelError(
            f"{origin}: a {FAMILY_NAMES[family]} checkpoint needs the configs and tokenizers of {repository}, which "
            f"could not be downloaded: {hub_reason(error, repository)} Set base_config to a diffusers folder of a "
            f"{FAMILY_NAMES[family]} model; its weights are not needed."
        ) from error


def _clip_name(name: str) -> str:
    """Restore the part of the text encoder's names that some SD1.5 merges lost."""
    return re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", "cond_stage_model.transformer.text_model.", name)
