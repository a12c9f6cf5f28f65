"""Pictures from text and image prompts: classifier-free guidance and DDIM in one short loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ipadapter_core import AdapterApplication, IPAdapter, check_compatible, diffusers_sites, inject

from .base_model import BaseModel
from .errors import TrainerError
from .features import encode_prompts

DECODE_ROWS = 16  # pictures that the VAE decodes at once; decoding needs the most memory of all


@torch.no_grad()
def generate(
    base_model: BaseModel,
    adapter: IPAdapter | None,
    *,
    prompts: Sequence[str],
    image_embeds: Tensor | None,
    weight: float | Sequence[float] = 1.0,
    negative_prompt: str = "",
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    size: int | None = None,
) -> Tensor:
    """Generate B pictures in one batch: float32 [B, 3, size, size] in [-1, 1], on the base model's device.

    B is the longer of `prompts` (1 or B texts, "" for none), `image_embeds` ([1 or B, E], see
    `features.encode_pictures`) and `weight` (a number, or 1 or B of them). Weight 0, no adapter and no
    embeddings are all the same: the base model alone. `guidance` of 1 or less turns guidance off. Picture i
    starts from the noise of seed + i, drawn on the CPU, so it can be made again alone and on another device.
    `size` defaults to what the model was made for.

    DDIM (arXiv 2010.02502), deterministic. The steps are spaced "trailing" (arXiv 2305.08891): they begin at
    the last timestep, where pure noise is what the model was trained on -- right for v-prediction, needed for
    zero-terminal-SNR schedules, and harmless for epsilon. The last step returns the predicted clean latent.

    Raises TrainerError for lengths that do not fit and adapters other than base, AdapterError for an adapter
    or embeddings that do not fit.
    """
    weights = [float(weight)] if isinstance(weight, (int, float)) else [float(w) for w in weight]
    count = _batch(len(prompts), 1 if image_embeds is None else len(image_embeds), len(weights))
    guided = guidance > 1
    text = encode_prompts(base_model, _repeated(list(prompts), count))
    if guided:
        negative = encode_prompts(base_model, [negative_prompt])
        text = torch.cat([negative.expand(count, -1, -1), text])
    application = AdapterApplication()
    if adapter is not None and image_embeds is not None and any(weights):
        application = _application(base_model, adapter, image_embeds, _repeated(weights, count), guided)
    latents = initial_latents(base_model, count, seed, size or base_model.sample_size)
    with inject(base_model.unet, application):
        latents = _sample(base_model, latents, text, steps, guidance if guided else None)
    return decode(base_model, latents)


def initial_latents(base_model: BaseModel, count: int, seed: int, size: int) -> Tensor:
    """Unit noise [count, 4, h, w]; row i is drawn with seed + i.

    Raises TrainerError when the size in pixels is not a whole number of latents.
    """
    side, rest = divmod(size, base_model.latent_scale)
    if rest or side < 1:
        raise TrainerError(f"size {size}: expected a multiple of {base_model.latent_scale} pixels.")
    shape = (int(base_model.unet.config["in_channels"]), side, side)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    return torch.stack(rows).to(base_model.device)


@torch.no_grad()
def decode(base_model: BaseModel, latents: Tensor) -> Tensor:
    """Latents [B, 4, h, w] -> pixels [B, 3, H, W] in [-1, 1], in float32."""
    scaled = latents.float() / base_model.vae.config["scaling_factor"]
    pixels = [base_model.vae.decode(rows).sample for rows in scaled.split(DECODE_ROWS)]
    return torch.cat(pixels).clamp(-1, 1)


def _application(
    base_model: BaseModel, adapter: IPAdapter, image_embeds: Tensor, weights: list[float], guided: bool
) -> AdapterApplication:
    """Keys and values of all rows, once for all steps; negative rows first, as in the text."""
    check_compatible(adapter.spec, diffusers_sites(base_model.unet))
    if adapter.spec.kind != "base":
        raise TrainerError(f"This is a {adapter.spec.kind} adapter; this version generates with base adapters only.")
    parameter = next(adapter.parameters())
    home, device = parameter.device, base_model.device
    tokens = adapter.encode(image_embeds.to(home, parameter.dtype)).expand(len(weights), -1, -1)
    if guided:
        tokens = torch.cat([adapter.negative_tokens().expand(len(weights), -1, -1), tokens])
        weights = weights + weights
    key_values = [type(pair)(*(part.to(device) for part in pair)) for pair in adapter.keys_values(tokens)]
    same = len(set(weights)) == 1
    return AdapterApplication(key_values, weights[0] if same else torch.tensor(weights, device=device))


def _sample(base_model: BaseModel, latents: Tensor, text: Tensor, steps: int, guidance: float | None) -> Tensor:
    scheduler = DDIMScheduler.from_config(
        base_model.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps, device=base_model.device)
    for timestep in scheduler.timesteps:
        noisy = latents.to(base_model.dtype)
        if guidance is None:
            predicted = base_model.unet(noisy, timestep, text).sample.float()
        else:
            both = base_model.unet(torch.cat([noisy, noisy]), timestep, text).sample.float()
            negative, positive = both.chunk(2)
            predicted = negative + guidance * (positive - negative)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def _batch(prompts: int, images: int, weights: int) -> int:
    count = max(prompts, images, weights)
    for name, length in (("prompts", prompts), ("image_embeds", images), ("weight", weights)):
        if length not in (1, count):
            raise TrainerError(f"{name} has {length} rows in a batch of {count}; expected 1 or {count}.")
    return count


def _repeated(items: list, count: int) -> list:  # type: ignore[type-arg]
    return items * count if len(items) == 1 else items
