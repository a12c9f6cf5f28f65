"""Images from text and image prompts: classifier-free guidance and DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from ipadapter_core import AdapterApplication, IPAdapter, inject

from ..errors import TrainerError
from .base_model import BaseModel
from .conditioning import TextStates, added_conditions, encode_prompts, time_ids
from .image_prompt import ImagePrompt, encode_image_prompt
from .parts import from_config

# Largest number of images, and of their pixels in all, that the VAE decodes at once: decoding needs the most memory.
DECODE_ROWS, DECODE_PIXELS = 16, 2**20
# Larger weights and guidance only give noise; larger images fit into no memory.
MAX_WEIGHT, MAX_GUIDANCE, MAX_SIDE = 10.0, 100.0, 16384


@torch.no_grad()
def generate(
    base_model: BaseModel,
    adapter: IPAdapter | None,
    *,
    prompts: Sequence[str] | TextStates,
    image_features: Sequence[Tensor] | None,
    weight: float | Sequence[float] = 1.0,
    negative_prompt: str | TextStates = "",
    steps: int = 20,
    guidance: float = 5.0,
    seed: int | Sequence[int] = 0,
    size: int | tuple[int, int] | None = None,
    scheduler: DDPMScheduler | None = None,
) -> Tensor:
    """Generate B images in one batch: float32 [B, 3, H, W] in [-1, 1], on the base model's device.

    B is the longest of `prompts` (1 or B texts, "" for none, or their states), `image_features` (what
    `IPAdapter.encode` takes, each with 1 or B rows; see `image_features.encode_images`) and `weight` (a number, or 1
    or B of them). The weight is that of the image attention and, for the faceid kinds, of the LoRA. Weight 0, no
    adapter and no features all generate with the base model alone. `guidance` of 1 or less turns guidance off; else
    negative rows get the features of a dropped image, as in training. Image i starts from noise of seed + i, or of
    seed[i], sampled on the CPU, so it can be reproduced alone and on another device. `size` is a side or (height,
    width) in pixels; the default is the UNet's. SDXL's time ids are those of uncropped images of that size.
    `scheduler` replaces the base model's noise schedule.

    Deterministic DDIM (arXiv 2010.02502) with "trailing" steps (arXiv 2305.08891): they begin at the last timestep,
    which zero-terminal-SNR schedules need and epsilon models tolerate. The last step returns the predicted clean
    latent.

    Raises TrainerError for lengths and numbers that do not fit and for an image prompt that is not finite, AdapterError
    for an adapter or features that do not fit.
    """
    weights = [float(weight)] if isinstance(weight, (int, float)) else [float(w) for w in weight]
    check_numbers(weights, guidance, steps, (scheduler or base_model.scheduler).config["num_train_timesteps"])
    features = tuple(image_features or ())
    count = _batch(len(prompts), [len(feature) for feature in features], len(weights))
    weights = weights * count if len(weights) == 1 else weights
    height, width = _size(base_model, size)
    text = _states(base_model, prompts, count)
    negative = _states(base_model, negative_prompt, 1) if guidance > 1 else None
    prompt = None
    if adapter is not None and features and any(weights):
        prompt = encode_image_prompt(base_model, adapter, features, guided=negative is not None)
    noise = initial_latents(base_model, count, seed, (height, width))
    latents = torch.empty_like(noise)
    for rows in _groups(weights, prompt, base_model.device):
        application = AdapterApplication()
        if prompt is not None:
            application = prompt.application(rows, [weights[i] for i in rows.tolist()])
        conditions = _Conditions(text.index(rows), negative, (height, width), guidance)
        with inject(base_model.unet, application):
            latents[rows] = _sample(base_model, noise[rows], conditions, steps, scheduler or base_model.scheduler)
    return decode(base_model, latents)


def initial_latents(
    base_model: BaseModel, count: int, seed: int | Sequence[int], size: int | tuple[int, int] | None
) -> Tensor:
    """Unit noise [count, C, h, w] for a side or (height, width) in pixels; row i is sampled with seed + i, or seed[i].

    Raises TrainerError when the size in pixels is not a whole number of latents, and for another number of seeds.
    """
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if outside := [seed for seed in seeds if not -(2**63) <= seed < 2**63]:
        raise TrainerError(f"seed is {outside[0]}; expected a whole number of 64 bits.")
    if len(seeds) != count:
        raise TrainerError(f"seed has {len(seeds)} rows in a batch of {count}; expected a number or {count} of them.")
    height, width = _size(base_model, size)
    shape = (base_model.latent_channels, height // base_model.latent_scale, width // base_model.latent_scale)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(row_seed)) for row_seed in seeds]
    return torch.stack(rows).to(base_model.device)


@torch.no_grad()
def decode(base_model: BaseModel, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> pixels [B, 3, H, W] in [-1, 1], in float32."""
    vae: Any = base_model.vae  # diffusers types its output as a tensor
    scaled = latents.to(base_model.vae_dtype) / base_model.scaling_factor
    rows_at_once = decode_rows(latents.shape[-2:].numel() * base_model.latent_scale**2)
    pixels = [vae.decode(rows).sample.float() for rows in scaled.split(rows_at_once)]
    return torch.cat(pixels).clamp(-1, 1)


def decode_rows(pixels: int) -> int:
    """The number of images of so many pixels each that `decode` decodes at once."""
    return max(1, min(DECODE_ROWS, DECODE_PIXELS // pixels))


@dataclass(frozen=True, eq=False)
class _Conditions:
    """Text [B, ...], one negative text or None for no guidance, and the images' (height, width)."""

    text: TextStates
    negative: TextStates | None
    size: tuple[int, int]
    guidance: float

    def arguments(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The UNet's text states and added conditions; negative rows first."""
        text = self.text
        if self.negative is not None:
            text = TextStates.cat([self.negative.expand(len(text)), text])
        size = torch.tensor([self.size], dtype=torch.float32).expand(len(text), -1)
        return text.states, added_conditions(text, time_ids(size, torch.zeros_like(size), size))


def check_numbers(weights: Sequence[float], guidance: float, steps: int, timesteps: int = 1000) -> None:
    """Raises TrainerError for NaN, infinity and numbers far outside the useful range."""
    for name, values, low, high in (
        ("weight", weights, -MAX_WEIGHT, MAX_WEIGHT),
        ("guidance", [guidance], 0, MAX_GUIDANCE),
        ("steps", [steps], 1, timesteps),
    ):
        if outside := [value for value in values if not low <= value <= high]:  # NaN is in no range
            raise TrainerError(f"{name} is {outside[0]:g}; expected a number from {low:g} to {high:g}.")


def _states(base_model: BaseModel, texts: str | Sequence[str] | TextStates, count: int) -> TextStates:
    """The states of texts, or states that are given, as `count` rows."""
    if not isinstance(texts, TextStates):
        texts = encode_prompts(base_model, [texts] if isinstance(texts, str) else texts)
    return texts.expand(count) if len(texts) == 1 else texts


def _groups(weights: list[float], prompt: ImagePrompt | None, device: torch.device) -> list[Tensor]:
    """Rows to sample at once: all of them, or those of one weight when there is a LoRA, which takes a single one."""
    rows = torch.arange(len(weights), device=device)
    if prompt is None or prompt.lora is None:
        return [rows]
    values = torch.tensor(weights, device=device)
    return [rows[values == value] for value in values.unique()]


def _sample(
    base_model: BaseModel, latents: Tensor, conditions: _Conditions, steps: int, schedule: DDPMScheduler
) -> Tensor:
    # Any, because diffusers types the timesteps as int.
    scheduler: Any = from_config(
        DDIMScheduler, schedule.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps, device=base_model.device)
    states, added = conditions.arguments()
    for timestep in scheduler.timesteps:
        noisy = latents.to(base_model.dtype)
        if conditions.negative is not None:
            noisy = torch.cat([noisy, noisy])
        predicted = base_model.unet(noisy, timestep, states, added_cond_kwargs=added).sample.float()
        if conditions.negative is not None:
            negative, positive = predicted.chunk(2)
            predicted = negative + conditions.guidance * (positive - negative)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def _size(base_model: BaseModel, size: int | tuple[int, int] | None) -> tuple[int, int]:
    height, width = size if isinstance(size, tuple) else (size or base_model.sample_size,) * 2
    scale = base_model.latent_scale
    if height % scale or width % scale or min(height, width) < scale:
        shown = height if height == width else f"{height} x {width} (height x width)"
        raise TrainerError(f"size {shown}: expected a multiple of {scale} pixels.")
    if max(height, width) > MAX_SIDE:
        raise TrainerError(f"size {height} x {width} (height x width): expected at most {MAX_SIDE} pixels a side.")
    return height, width


def _batch(prompts: int, features: list[int], weights: int) -> int:
    count = max(prompts, *features, weights)
    named = [("prompts", prompts), *(("image_features", length) for length in features), ("weight", weights)]
    for name, length in named:
        if length not in (1, count):
            raise TrainerError(f"{name} has {length} rows in a batch of {count}; expected 1 or {count}.")
    return count
