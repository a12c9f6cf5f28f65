"""The frozen base model: the parts of a text-to-image model, and the encoder of image prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

from ipadapter_core import Site, diffusers_sites, family_of

from ..errors import BaseModelError
from .hub import find_model, refuse_missing
from .image_encoder import ImageEncoder, find_image_encoder
from .image_processor import CLIPImageProcessor
from .model_config import PARTS, ModelConfig, clip_values
from .model_folder import PREDICTION_TYPES, TIME_IDS, read_folder
from .parts import freeze, load_part
from .single_file import load_from_checkpoint, read_single_file


class BaseModel:
    """A frozen text-to-image model with its image encoder; `load_base_model` makes it.

    A part's weights are read when it is first used, and again after `release`. All parts have `dtype`, except the VAE
    of SDXL, and any in float16: half precision overflows in it, so it is in float32 unless its config has
    `force_upcast` false, as fixed variants do.
    """

    def __init__(
        self, config: ModelConfig, encoder: ImageEncoder | None, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._config, self._encoder = config, encoder
        self._loaded: dict[str, Any] = {}
        self.dtype, self.device = dtype, torch.device(device)
        self.name = config.name
        self.is_sdxl = config.is_sdxl  # two text encoders, pooled text embeddings and time ids
        self.tokenizers, self.scheduler = config.tokenizers, config.scheduler
        self.prediction_type = str(self.scheduler.config["prediction_type"])  # "epsilon" or "v_prediction"
        self.num_train_timesteps = int(self.scheduler.config["num_train_timesteps"])  # 1000
        self.text_length = config.text_length  # tokens of a prompt, padding included (77)
        overflows = self.is_sdxl or dtype == torch.float16
        self.vae_dtype = torch.float32 if overflows and config.vae["force_upcast"] else dtype
        self.latent_channels = int(config.vae["latent_channels"])  # 4
        self.latent_scale = 2 ** (len(config.vae["block_out_channels"]) - 1)  # pixels per latent (8)
        self.sample_size = int(config.unet["sample_size"]) * self.latent_scale  # side of its images in pixels
        self.scaling_factor = float(config.vae["scaling_factor"])  # of the latents (0.18215, for SDXL 0.13025)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet."""
        return self._part("unet")

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE."""
        return self._part("vae")

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """The text encoders: one, or SDXL's two."""
        return self._part("text_encoders")

    @property
    def image_encoder(self) -> CLIPVisionModelWithProjection:
        """The encoder of image prompts. Raises BaseModelError when there is none."""
        return self._part("image_encoder")

    def release(self, *names: str) -> None:
        """Free "unet", "vae", "text_encoders" or "image_encoder". They are read again when they are used."""
        parts = ("unet", "vae", "text_encoders", "image_encoder")
        for name in names:
            if name not in parts:
                raise ValueError(f"There is no part {name!r}; parts are {', '.join(parts)}.")
            self._loaded.pop(name, None)
        torch.cuda.empty_cache()  # does nothing on a CPU

    @contextmanager
    def temporarily_loaded(self) -> Iterator[None]:
        """Free at the end of the `with` block what was loaded inside it."""
        before = set(self._loaded)
        try:
            yield
        finally:
            self.release(*(set(self._loaded) - before))

    def to_device(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a tensor of the data loader to the model's device without blocking, then cast it there.

        A cast on the CPU would leave the loader's pinned memory, and copies from other memory wait for queued work.
        """
        return tensor.to(self.device, non_blocking=True).to(dtype or tensor.dtype)

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first tokenizer."""
        return self.tokenizers[0]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The UNet's cross-attention layers in id order."""
        return diffusers_sites(self.meta_unet())

    @property
    def family(self) -> str:
        """ "sd15", "sd2" or "sdxl" for UNets of their shapes, else "context-<dim>"."""
        return family_of(self.sites[0].cross_attention_dim, [site.dim for site in self.sites])

    @property
    def image_processor(self) -> CLIPImageProcessor:
        """The image encoder's preprocessing."""
        return self._image_encoder.processor

    @property
    def image_dim(self) -> int:
        """Channels of the image encoder's `image_embeds`."""
        return self._image_encoder.image_dim

    @property
    def hidden_dim(self) -> int:
        """Channels of the image encoder's hidden states."""
        return self._image_encoder.hidden_dim

    @property
    def image_tokens(self) -> int:
        """Hidden states per image: its patches and the class token (257 for ViT-H/14)."""
        return self._image_encoder.num_tokens

    @property
    def encoder_name(self) -> str:
        """The image encoder's published name, or its sizes."""
        return self._image_encoder.name

    def meta_unet(self) -> UNet2DConditionModel:
        """A new UNet on the meta device, without weights. The other `meta_*` likewise."""
        return self._config.without_weights("unet")

    def meta_vae(self) -> AutoencoderKL:
        """The VAE."""
        return self._config.without_weights("vae")

    def meta_text_encoders(self) -> nn.ModuleList:
        """The text encoders."""
        return nn.ModuleList(self._config.without_weights(part) for part in self._config.text_parts)

    def meta_image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder. Raises BaseModelError when there is none."""
        return self._image_encoder.without_weights()

    def meta_conditions(self, batch_size: int) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` for B rows on the meta device; None for models without."""
        dims = {"text_embeds": int(self._config.texts[-1].projection_dim), "time_ids": TIME_IDS}
        added = {name: torch.zeros(batch_size, dim, device="meta") for name, dim in dims.items()}
        return added if self.is_sdxl else None

    def fingerprint(self) -> str:
        """16 hex digits of the UNet's weights and config and of the noise schedule; fine-tunes differ.

        Equal for every precision of the run and of the files, and for a folder and a single file (but for the text
        encoders of SD2 and SDXL, which single files hold in OpenCLIP's layout). The other fingerprints likewise.
        """
        return self._config.unet_fingerprint

    def vae_fingerprint(self) -> str:
        """Of the VAE's weights and config."""
        return self._config.vae_fingerprint

    def text_fingerprint(self) -> str:
        """Of the text encoders' weights and of how the tokenizers split text."""
        return self._config.text_fingerprint

    def encoder_fingerprint(self) -> str:
        """Of the image encoder's weights and preprocessing. Raises BaseModelError when there is none."""
        return self._image_encoder.fingerprint

    def encoder_values(self) -> dict[str, Any]:
        """The `clip_values` of the image encoder. Raises BaseModelError when there is none."""
        return clip_values(self._image_encoder.config)

    @property
    def _image_encoder(self) -> ImageEncoder:
        if self._encoder is None:
            raise BaseModelError(
                f"{self.name}: no image encoder was given. Set image_encoder to the folder of a "
                "CLIPVisionModelWithProjection, or its .safetensors file."
            )
        return self._encoder

    def _part(self, name: str) -> Any:
        if name not in self._loaded:
            parts = self._config.text_parts
            self._loaded[name] = tuple(map(self._load, parts)) if name == "text_encoders" else self._load(name)
        return self._loaded[name]

    def _load(self, part: str) -> Any:
        dtype = self.vae_dtype if part == "vae" else self.dtype
        if part == "image_encoder":
            network: Any = self._image_encoder.load()
        elif self._config.checkpoint is not None:
            network = load_from_checkpoint(self._config, part, dtype)
        else:
            options: dict[str, Any] = {} if part in self._config.text_parts else {"torch_dtype": dtype}
            network = load_part(PARTS[part].kind, self._config.folder / part, **options)
        if part == "vae":
            network.to(memory_format=torch.channels_last)  # on a CPU its convolutions are a quarter faster then
        return freeze(network, self.device, dtype)


def load_base_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    image_encoder: Path | None = None,
    base_config: Path | None = None,
    needs_image_encoder: bool = True,
    prediction_type: str | None = None,
) -> BaseModel:
    """A frozen SD1.5, SD2 or SDXL model. Its configs are checked now; its weights are read when they are used.

    `path` is a diffusers folder, a Hub id, or a single .safetensors checkpoint, which takes its configs and tokenizers
    from `base_config`, see `read_single_file`. `image_encoder` is the folder, Hub id or .safetensors file of the image
    encoder when it is not `image_encoder` inside `path` (or `base_config`). With `needs_image_encoder` False there may
    be none. `prediction_type` ("epsilon" or "v_prediction") must agree with the model, and decides for a single file
    that does not state its own.

    Raises BaseModelError for a missing part, another model (inpainting, refiner, SD3, FLUX, flow matching) or another
    file (LoRA, VAE, ControlNet, IP-Adapter), saying what was found; and for damaged weights when they are used.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise BaseModelError(f"prediction_type is {prediction_type!r}; expected {' or '.join(PREDICTION_TYPES)}.")
    refuse_missing(path, image_encoder)
    path = find_model(path)
    if path.suffix == ".safetensors" and path.is_file():
        config = read_single_file(path, base_config, prediction_type)
    elif base_config is not None:
        raise BaseModelError(
            f"base_config={base_config} is for a single-file base model, but {path} is a folder with configs of its "
            "own. Leave base_config out."
        )
    else:
        config = read_folder(path, prediction_type)
    encoder = find_image_encoder(config.folder, image_encoder, needs_image_encoder)
    return BaseModel(config, encoder, dtype, device)
