"""A text-to-image model as one .safetensors file in the original layout (LDM for SD1.5 and SD2, SGM for SDXL)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ipadapter_core import FAMILY_NAMES, AdapterError, looks_like
from ipadapter_core.tensors import TensorFile, check_weights

from ..errors import BaseModelError
from .hub import cached_snapshot, hub_reason
from .model_folder import FAMILIES, ModelFolder, new_scheduler
from .parts import quiet_libraries
from .published_models import repository_of
from .weight_files import PAGE, open_weights, weights_fingerprint

Family = Literal["sd15", "sd2", "sdxl"]

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", ("cond_stage_model.", "conditioner.")
_PREFIXES: dict[str, tuple[str, ...]] = {"unet": (_UNET,), "vae": (_VAE,), "text_encoders": _TEXT}
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_REPOSITORIES: dict[Family, str] = {
    "sd15": repository_of("stable-diffusion-v1-5"),
    "sd2": repository_of("stable-diffusion-2-1"),
    "sdxl": repository_of("stable-diffusion-xl-base-1.0"),
}
_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt"]
_INPUTS = {5: "a depth model", 7: "an upscaler", 8: "an editing model (InstructPix2Pix)", 9: "an inpainting model"}
# What a file with a UNet, or without, may be instead; the first match wins.
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"^control_model\.|^input_hint_block\.|^controlnet_", "a ControlNet"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\..*img_attn", "a FLUX model"),
    (r"^edm_mean$", "a Playground v2.5 model"),
    (r"^down_blocks\..*attn2\.to_k\.", "a UNet alone, in the diffusers layout"),
)
_STATED = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
# Of SD2's two targets, this bias is widely spread in v-prediction models only (ComfyUI's rule).
_SD2_BIAS, _SD2_SPREAD = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

log = logging.getLogger(__name__)


class SingleFile:
    """A checkpoint file; its weights wait for `load_*`.

    Configs and tokenizers come from `base_config`, a diffusers folder of the same family, or from the one that
    diffusers takes them from (in the hub's cache, else downloaded). The target is what the file says (a `v_pred`
    tensor, `modelspec.prediction_type` in its metadata), else `prediction_type`, else what the scheduler of
    `base_config` says; a `ztsnr` tensor asks for a noise schedule that ends in pure noise.

    Raises BaseModelError for other files, by name, for a file without VAE or text encoder, for a `base_config` of
    another family and a `prediction_type` that the file contradicts.
    """

    def __init__(self, path: Path, base_config: Path | None = None, prediction_type: str | None = None) -> None:
        self.path = path
        header = open_weights(path, f"a checkpoint of {FAMILIES}")
        self.family = checkpoint_family(header, str(path))
        folder = hub_configs(self.family, path) if base_config is None else Path(base_config)
        self.configs = ModelFolder(folder, needs_weights=False)
        self._check_family(header)
        self.name = path.stem
        self.is_sdxl = self.configs.is_sdxl
        self.unet_config = self.configs.unet_config
        self.vae_config = self.configs.vae_config
        self.text_configs = self.configs.text_configs
        self.tokenizers = self.configs.tokenizers
        self.scheduler = self._new_scheduler(header, prediction_type)

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Read the UNet; of two, the one that is not an average (EMA), as every host does."""
        return self._load("unet", partial(UNet2DConditionModel.from_single_file, self._read((_UNET,))), dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Read the VAE."""
        return self._load("vae", partial(AutoencoderKL.from_single_file, self._read((_VAE,))), dtype)

    def load_text_encoders(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Read the text encoders, one or two."""
        state = {_clip_name(name): tensor for name, tensor in self._read(_TEXT).items() if "position_ids" not in name}
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        # What StableDiffusionPipeline.from_single_file calls for this part.
        loads = [partial(create_diffusers_clip_model_from_ldm, kind, state) for kind in kinds]
        parts = self.configs.parts[2:]
        return tuple(self._load(part, load, dtype) for part, load in zip(parts, loads, strict=False))

    def fingerprint(self, part: str) -> str:
        """A digest of the weights of "unet", "vae" or "text_encoders", read from the file."""
        return weights_fingerprint([self.path], _PREFIXES[part])

    def _load(self, part: str, load: Callable[..., nn.Module], dtype: torch.dtype) -> Any:
        """Load a part. Raises BaseModelError when its tensors do not fit the config, or some are missing."""
        options = {"config": str(self.configs.folder), "subfolder": part, "local_files_only": True}
        try:
            with quiet_libraries():  # they warn of every change of dtype, even when they make it themselves
                network = load(**options, torch_dtype=dtype).to("cpu")
        except NotImplementedError as error:  # tensors without data were left, and cannot be moved
            raise BaseModelError(
                f"{self.path}: its {part} is incomplete: tensors that the config in {self.configs.folder} asks for are "
                f"missing. Download it again from {PAGE}, or use the base_config of its family."
            ) from error
        except Exception as error:  # of any class, from three libraries
            reason = " ".join(str(error).split())[:300]
            raise BaseModelError(
                f"{self.path}: its {part} does not fit the config in {self.configs.folder}: {reason}"
            ) from error
        try:
            check_weights(network.state_dict(), f"{self.path}, {part}")
        except AdapterError as error:
            raise BaseModelError(str(error)) from error
        return network

    def _read(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        with safe_open(str(self.path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118

    def _check_family(self, header: TensorFile) -> None:
        to_k = next(t for n, t in header.infos.items() if n.startswith(_UNET) and n.endswith("attn2.to_k.weight"))
        found, wanted = to_k.shape[-1], self.configs.unet_config["cross_attention_dim"]
        if found != wanted or self.configs.is_sdxl != (self.family == "sdxl"):
            raise BaseModelError(
                f"{self.path}: a {FAMILY_NAMES[self.family]} model (context {found}), but base_config "
                f"{self.configs.folder} is for a context of {wanted}. Use a folder of the same family."
            )

    def _new_scheduler(self, header: TensorFile, prediction_type: str | None) -> DDPMScheduler:
        stated = stated_prediction(header)
        if stated and prediction_type not in (None, stated):
            raise BaseModelError(f"prediction_type is {prediction_type!r}, {self.path} says {stated!r}. Leave it out.")
        configured = self.configs.scheduler_config.get("prediction_type", "epsilon")
        target = stated or prediction_type or configured
        if self.family == "sd2" and stated is None and prediction_type is None:
            self._doubt(target)
        changes = {"rescale_betas_zero_snr": True} if "ztsnr" in header.infos else {}
        return new_scheduler(self.configs.scheduler_config, prediction_type=target, **changes)

    def _doubt(self, target: str) -> None:
        """Warn when an SD2 file, which does not say what it predicts, does not look like the config's target."""
        bias = self._read((_SD2_BIAS,)).get(_SD2_BIAS)
        if bias is None:
            return
        likely = "v_prediction" if bias.float().std(correction=0) > _SD2_SPREAD else "epsilon"
        if likely != target:
            log.warning(
                "%s: the config says %s, the weights look like %s. Set prediction_type when the config is wrong.",
                self.path,
                target,
                likely,
            )


def _has(header: TensorFile, *prefixes: str) -> bool:
    """Whether any tensor's name starts with one of these."""
    return any(name.startswith(prefixes) for name in header.infos)


def checkpoint_family(header: TensorFile, origin: str) -> Family:
    """The family of a checkpoint, from its tensors' names and shapes; `origin` is for errors.

    Raises BaseModelError for anything but a whole SD1.5, SD2 or SDXL text-to-image model, by name.
    """
    other = next((what for rule, what in _OTHERS if any(re.search(rule, name) for name in header.infos)), None)
    if other or _CONV_IN not in header.infos:
        what = other or looks_like(header.infos)
        raise BaseModelError(
            f"{origin}: looks like {what}, not a checkpoint that can be trained on. Use a whole {FAMILIES} checkpoint "
            "in the original layout, or a diffusers folder."
        )
    sdxl = _has(header, "conditioner.embedders.1.")
    if _has(header, "conditioner.embedders.0.model.") and not sdxl:
        raise BaseModelError(f"{origin}: the SDXL refiner, which takes no image prompts. Use the SDXL base model.")
    channels = header.infos[_CONV_IN].shape[1]
    if channels in _INPUTS:
        raise BaseModelError(
            f"{origin}: the UNet takes {channels} channels: {_INPUTS[channels]}. Use the plain text-to-image model."
        )
    for what, prefixes in (("VAE", (_VAE,)), ("text encoder", _TEXT)):
        if not _has(header, *prefixes):
            raise BaseModelError(
                f"{origin}: has a UNet but no {what} (no tensor starts with {prefixes[0]!r}). Use a whole checkpoint, "
                "or a diffusers folder."
            )
    if sdxl:
        return "sdxl"
    return "sd2" if _has(header, "cond_stage_model.model.") else "sd15"


def stated_prediction(header: TensorFile) -> str | None:
    """What a file itself says that its UNet predicts: "v_prediction", "epsilon", or None when it is silent."""
    if "v_pred" in header.infos:
        return "v_prediction"
    return _STATED.get(str(header.metadata.get("modelspec.prediction_type", "")).lower())


def hub_configs(family: Family, origin: Path) -> Path:
    """The configs and tokenizers of a family's base model, from the hub's cache, else downloaded.

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
    """Some SD1.5 merges lost a part of the text encoder's names."""
    return re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", "cond_stage_model.transformer.text_model.", name)
