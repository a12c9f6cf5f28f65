"""The frozen base: every part of a text-to-image model, from a diffusers folder or a single file."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from ..errors import BaseModelError
from .hub import find_model, refuse_missing
from .image_encoder import ImageEncoder
from .model_folder import PREDICTION_TYPES, ModelFolder
from .model_shapes import ModelParts, ModelShapes
from .single_file import SingleFile

_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


class BaseModel(ModelShapes):
    """A frozen text-to-image model and the encoder of image prompts; `load_base_model` makes it.

    Weights are read when a part is first used, and again after `release`; what the configs say needs none. The UNet
    and the encoders have `dtype`, and so has the VAE, but for SDXL's, and any in float16: its activations grow so large
    that half precision loses the image, so it is in float32 unless its config has `force_upcast` false, as the fixed
    variants have.
    """

    def __init__(
        self, parts: ModelParts, encoder: ImageEncoder | None, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(parts, encoder, dtype)
        self.device = torch.device(device)  # of all parts
        self._loaded: dict[str, Any] = {}
        self._weight_digests: dict[str, str] = {}

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet."""
        return self._part("unet", lambda: self._parts.load_unet(self.dtype))

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE."""
        # channels_last: its convolutions are a quarter faster so on a CPU.
        return self._part("vae", lambda: self._parts.load_vae(self.vae_dtype).to(memory_format=torch.channels_last))

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """The text encoders: one, or SDXL's two."""
        return self._part("text_encoders", lambda: self._parts.load_text_encoders(self.dtype))

    def to_device(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the data loader on the device of the model, without waiting for the device.

        It is moved before it is cast: a cast on the CPU would leave the loader's pinned memory, and a copy from other
        memory waits for all work that is queued.
        """
        return tensor.to(self.device, non_blocking=True).to(dtype or tensor.dtype)

    @contextmanager
    def temporarily_loaded(self) -> Iterator[None]:
        """Parts that are first used inside are freed at the end."""
        before = set(self._loaded)
        try:
            yield
        finally:
            self.release(*(set(self._loaded) - before))

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def image_encoder(self) -> CLIPVisionModelWithProjection:
        """The encoder of image prompts. Raises BaseModelError when there is none."""
        return self._part("image_encoder", lambda: self._image_encoder.load().to(self.dtype))

    def release(self, *names: str) -> None:
        """Free parts: "unet", "vae", "text_encoders", "image_encoder". A later use reads them again."""
        known = ("unet", "vae", "text_encoders", "image_encoder")
        for name in names:
            if name not in known:
                raise ValueError(f"There is no part {name!r}; parts are {', '.join(known)}.")
            self._loaded.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fingerprint(self) -> str:
        """16 hex digits of the UNet's weights and config and of the noise schedule; fine-tunes differ.

        Read from the files, so the precision of a run does not change it, nor does float16 instead of float32, nor a
        single file instead of a folder of the same weights. The other fingerprints likewise.
        """
        schedule = {key: self.scheduler.config.get(key) for key in _NOISE_SCHEDULE}
        return self._digest("unet", _set_values(UNet2DConditionModel, self._parts.unet_config), schedule)

    def vae_fingerprint(self) -> str:
        """16 hex digits of the VAE's weights and config."""
        return self._digest("vae", _set_values(AutoencoderKL, self._parts.vae_config))

    def text_fingerprint(self) -> str:
        """16 hex digits of the text encoders' weights and of what the tokenizers make of two texts.

        SD2's and SDXL's single files hold OpenCLIP's layout, which has another fingerprint than the folder.
        """
        texts = ["", "The quick brown fox jumps over 13 lazy dogs; naïve façade, 50%!"]
        ids = [
            t(texts, padding="max_length", truncation=True, max_length=self.text_length).input_ids
            for t in self.tokenizers
        ]
        return self._digest("text_encoders", ids, [len(t) for t in self.tokenizers])

    def encoder_fingerprint(self) -> str:
        """16 hex digits of the image encoder's weights and preprocessing. Raises BaseModelError without one."""
        return self._remembered("image_encoder", self._image_encoder.fingerprint)

    def _part(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            loaded = load()
            for module in loaded if isinstance(loaded, tuple) else (loaded,):
                module.requires_grad_(False).eval().to(self.device)
                if self.device.type == "cpu":
                    _copy_into_memory(module)
            self._loaded[name] = loaded
        return self._loaded[name]

    def _digest(self, part: str, *more: Any) -> str:
        weights = self._remembered(part, lambda: self._parts.fingerprint(part))
        text = json.dumps([weights, *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _remembered(self, part: str, compute: Callable[[], str]) -> str:
        if part not in self._weight_digests:
            self._weight_digests[part] = compute()
        return self._weight_digests[part]


def load_base_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    image_encoder: Path | None = None,
    base_config: Path | None = None,
    needs_image_encoder: bool = True,
    prediction_type: str | None = None,
) -> BaseModel:
    """A frozen model of SD1.5, SD2 or SDXL. What is wrong with it is said now; its weights are read when used.

    `path` is a diffusers folder, a Hub id, or a single .safetensors checkpoint in the original (LDM, SGM) layout. A
    single file takes its configs and tokenizers from `base_config`, a diffusers folder of the same family (its
    weights are not needed); by default from the repository of its family's base model, in the hub's cache or
    downloaded into it.

    `image_encoder` is the folder, Hub id or .safetensors file of the image encoder when it is not `image_encoder`
    inside `path` (or `base_config`). With `needs_image_encoder` False there may be none.

    `prediction_type` ("epsilon" or "v_prediction") must be what the model says. A single file says it with a `v_pred`
    tensor or in its metadata (`modelspec.prediction_type`); where it is silent, `prediction_type` wins over the
    scheduler of `base_config`.

    Raises BaseModelError for a missing part, naming it and what was found; for another model (inpainting, refiner,
    SD3, FLUX, flow matching) or another file (LoRA, VAE, ControlNet, IP-Adapter); and, when they are used, for
    weights that cannot be read.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise BaseModelError(f"prediction_type is {prediction_type!r}; expected {' or '.join(PREDICTION_TYPES)}.")
    refuse_missing(path, image_encoder)
    path = find_model(path)
    image_encoder = None if image_encoder is None else find_model(image_encoder)
    if path.suffix == ".safetensors" and path.is_file():
        single = SingleFile(path, base_config, prediction_type)
        encoder = _find_encoder(single.configs.folder, image_encoder, needs_image_encoder)
        return BaseModel(single, encoder, dtype, device)
    parts = ModelFolder(path)
    says = parts.scheduler.config["prediction_type"]
    if prediction_type not in (None, says):
        raise BaseModelError(
            f"prediction_type is {prediction_type!r}, the scheduler of {path} says {says!r}. Leave it out, or correct "
            "scheduler/scheduler_config.json."
        )
    return BaseModel(parts, _find_encoder(path, image_encoder, needs_image_encoder), dtype, device)


def _find_encoder(folder: Path, image_encoder: Path | None, needed: bool) -> ImageEncoder | None:
    inside = folder / "image_encoder"
    if image_encoder is None and not needed and not any(inside.glob("*.safetensors")) and not any(inside.glob("*.bin")):
        return None
    found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
    return ImageEncoder(Path(image_encoder or inside), folder / "feature_extractor", f" (found in {folder}: {found})")


def _copy_into_memory(module: nn.Module) -> None:
    """Weights on the CPU are a view of their file, wherever they lie in it. Own ones survive a change of the file, and
    are aligned: sums over unaligned ones may round differently, so a folder and a single file would not be equal.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def _set_values(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that are not the defaults: versions of diffusers differ in the rest."""
    defaults = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return {k: v for k, v in config.items() if k in plain and v not in (plain[k], defaults[k])}
