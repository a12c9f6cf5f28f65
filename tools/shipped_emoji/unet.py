"""The stack's UNet: SD1.5's sixteen cross-attention layers at a hundredth of its size, over 8x8 latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ipadapter_trainer.demo.emoji import EmojiImages, styled_caption

from .clip import WIDTH, tokenize
from .loop import LossFunction, device_of
from .vae import encode_views

BATCH = 64
NO_TEXT, PLAIN = 0.1, 0.4  # shares of the batch without text, and with a caption that names no style
VIEWS = 16  # of each image, mirrored and shifted: six thousand latents alone are soon known by heart


def new_unet() -> UNet2DConditionModel:
    """SD1.5's layout, four levels of two layers; random weights. Channels are multiples of SD's 32 norm groups."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads a layer: the name is diffusers' well-known slip
        norm_num_groups=32,
    )


def new_scheduler() -> DDPMScheduler:
    """SD1.5's noise schedule with the v target, which a small model learns faster at high noise (arXiv 2202.00512)."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        steps_offset=1,
    )


@torch.no_grad()
def text_states(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[N, 16, 128] on the CPU: the last hidden states that condition the UNet."""
    ids = tokenize(tokenizer, texts)
    device = device_of(text_encoder)
    return torch.cat([text_encoder(chunk.to(device)).last_hidden_state.cpu() for chunk in ids.split(256)])


def unet_losses(
    images: EmojiImages,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    batch_size: int = BATCH,
) -> LossFunction:
    """Plain v-prediction MSE over uniform timesteps; latents and text states are computed once, here."""
    latents = encode_views(vae, images, VIEWS) * vae.config["scaling_factor"]
    styled = [styled_caption(c, s) for c, s in zip(images.captions, images.styles, strict=True)]
    states = torch.stack(
        [
            text_states(text_encoder, tokenizer, [""]).expand(len(images), -1, -1),
            text_states(text_encoder, tokenizer, list(images.captions)),
            text_states(text_encoder, tokenizer, styled),
        ]
    )
    scheduler: Any = new_scheduler()

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        clean = latents[torch.randint(VIEWS, (batch_size,), generator=generator), rows]
        draw = torch.rand(batch_size, generator=generator)
        context = states[(draw > NO_TEXT).long() + (draw > NO_TEXT + (1 - NO_TEXT) * PLAIN).long(), rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config["num_train_timesteps"], (batch_size,), generator=generator)
        device = device_of(model)
        clean, noise, timesteps, context = (x.to(device) for x in (clean, noise, timesteps, context))
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return {"loss": F.mse_loss(model(noisy, timesteps, context).sample, target)}

    return losses
