"""A base model without its weights: configs, tokenizers, noise schedule, and where the weights are."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ipadapter_core.empty import without_weights

from .parts import from_config, weight_files
from .weight_files import weights_fingerprint

_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


class Part(NamedTuple):
    """The class of a part, and the prefixes of its tensors in a single file (LDM, SGM)."""

    kind: Any  # a class; Any, because diffusers' and transformers' types of their class methods are wrong
    prefixes: tuple[str, ...]


_TEXT = ("cond_stage_model.", "conditioner.")
PARTS: Mapping[str, Part] = {  # by their folders' names
    "unet": Part(UNet2DConditionModel, ("model.diffusion_model.",)),
    "vae": Part(AutoencoderKL, ("first_stage_model.",)),
    "text_encoder": Part(CLIPTextModel, _TEXT),
    "text_encoder_2": Part(CLIPTextModelWithProjection, _TEXT),
}


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """A base model, read by `model_folder.read_folder` or `single_file.read_single_file`."""

    name: str
    folder: Path  # in the diffusers layout
    unet: dict[str, Any]  # the config with all defaults; `vae` likewise
    vae: dict[str, Any]
    texts: tuple[Any, ...]  # a CLIPTextConfig per text encoder; Any, because transformers types sizes as optional
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler: DDPMScheduler
    checkpoint: Path | None = None  # the single file that holds all weights; None: they are in `folder`

    @property
    def is_sdxl(self) -> bool:
        """Whether there are two text encoders, pooled text embeddings and time ids."""
        return self.unet["addition_embed_type"] == "text_time"

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The folders of the text encoders."""
        return ("text_encoder", "text_encoder_2")[: len(self.texts)]

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, padding included (77 for all published models)."""
        lengths = (*(t.model_max_length for t in self.tokenizers), *(c.max_position_embeddings for c in self.texts))
        return int(min(lengths))

    def without_weights(self, part: str) -> Any:
        """A new module of a part on the meta device."""
        with without_weights():
            if part in self.text_parts:
                return PARTS[part].kind(self.texts[self.text_parts.index(part)])
            return from_config(PARTS[part].kind, {"unet": self.unet, "vae": self.vae}[part])

    @cached_property
    def unet_fingerprint(self) -> str:
        """Of the UNet's weights and config and of the noise schedule."""
        schedule = {key: self.scheduler.config.get(key) for key in _NOISE_SCHEDULE}
        return self._fingerprint(("unet",), _set_values(UNet2DConditionModel, self.unet), schedule)

    @cached_property
    def vae_fingerprint(self) -> str:
        """Of the VAE's weights and config."""
        return self._fingerprint(("vae",), _set_values(AutoencoderKL, self.vae))

    @cached_property
    def text_fingerprint(self) -> str:
        """Of the text encoders' weights and configs and of the tokens of two texts."""
        texts = ["", "The quick brown fox jumps over 13 lazy dogs; naïve façade, 50%!"]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        ids = [tokenizer(texts, **options).input_ids for tokenizer in self.tokenizers]
        vocabularies = [len(tokenizer) for tokenizer in self.tokenizers]
        return self._fingerprint(self.text_parts, ids, vocabularies, [clip_values(config) for config in self.texts])

    def _fingerprint(self, parts: tuple[str, ...], *more: Any) -> str:
        text = json.dumps(["".join(self._weights(parts)), *more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _weights(self, parts: tuple[str, ...]) -> Iterator[str]:
        if self.checkpoint is not None:
            yield weights_fingerprint([self.checkpoint], PARTS[parts[0]].prefixes)
            return
        for part in parts:
            yield weights_fingerprint(weight_files(self.folder / part))


def clip_values(config: Any) -> dict[str, Any]:
    """The values of a CLIP config that decide what its weights compute."""
    names = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
    return {name: getattr(config, name, None) for name in names}


def _set_values(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that differ from the defaults; versions of diffusers differ in the rest."""
    defaults = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return {k: v for k, v in config.items() if k in plain and v not in (plain[k], defaults[k])}
