"""The stack's UNet: SD1.5's sixteen cross-attention layers at a hundredth of its size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ipadapter_trainer.demo.emoji import styled_caption, to_pixels
from ipadapter_trainer.demo.views import LATENT, numbered_view, other_colours

from .clip import tokenize
from .images import STYLE_NAMES, EmojiImages
from .loop import LossFunction, device_of, training_device
from .vae import encode
from .vision import WIDTH

BATCH = 64
NO_TEXT, PLAIN, STYLE_ONLY = 0.1, 0.3, 0.15  # shares of the captions: none, without style, the style alone
RECOLOURED, OTHERS = 0.25, 0.25  # shares of the images
VIEWS = 2  # of each image in its own colours, and as many recoloured


def new_unet(size: int) -> UNet2DConditionModel:
    """SD1.5's layout, four levels of two layers, for images of ``size`` pixels a side; random weights."""
    unet = UNet2DConditionModel(
        sample_size=size // LATENT,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads a layer: the name is diffusers' well-known slip
        norm_num_groups=32,
    )
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):  # slow in bfloat16 on a CPU, and on a GPU autocast does the same
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return unet


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
    """[N, 16, 128] on the encoder's device: the last hidden states that condition the UNet."""
    ids = tokenize(tokenizer, texts).to(device_of(text_encoder))
    return torch.cat([text_encoder(chunk).last_hidden_state for chunk in ids.split(256)])


def encode_views(vae: AutoencoderKL, images: EmojiImages, views: int, generator: torch.Generator) -> Tensor:
    """[2, views, N, 4, H/8, W/8], scaled: the images in their own colours and recoloured; the first view of each is the
    image itself, the second its mirror image, the others are mirrored and shifted at random.
    """
    device = generator.device
    own, recoloured = [], []
    for view in range(views):
        pixels = numbered_view(to_pixels(images.images.to(device)), view, generator)
        own.append(encode(vae, pixels))
        recoloured.append(encode(vae, other_colours(pixels, generator)))
    return torch.stack([torch.stack(own), torch.stack(recoloured)]) * vae.config["scaling_factor"]


def unet_losses(
    images: EmojiImages,
    others: EmojiImages,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    batch_size: int = BATCH,
    views: int = VIEWS,
) -> LossFunction:
    """Plain v-prediction MSE over uniform timesteps; latents and text states are computed once, here.

    The captions of ``others``, images of what the model need not know, say the style alone: else a style is learned
    with each concept, and cannot be asked for where it was never seen. Every style is drawn equally often.
    Recoloured images, whose captions say so, are there for the image prompts: their colours are not those that the
    concept usually has.
    """
    device = training_device()
    generator = torch.Generator(device).manual_seed(0)
    latents, other_latents = encode_views(vae, images, views, generator), encode_views(vae, others, 1, generator)
    style_ids, other_style_ids = images.style_ids.to(device), others.style_ids.to(device)
    evenly, others_evenly = ((1 / torch.bincount(ids).float())[ids] for ids in (style_ids, other_style_ids))
    plain = list(images.captions)
    styled = [styled_caption(c, s) for c, s in zip(images.captions, images.styles, strict=True)]
    recoloured_captions = [[f"{text}, recoloured" for text in texts] for texts in (plain, styled)]
    states = torch.stack(
        [text_states(text_encoder, tokenizer, texts) for texts in (plain, styled, *recoloured_captions)]
    ).to(device)
    of_styles = text_states(text_encoder, tokenizer, [f"{style} style" for style in STYLE_NAMES]).to(device)
    no_text = text_states(text_encoder, tokenizer, [""]).to(device)
    scheduler: Any = new_scheduler()

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def draw() -> Tensor:
            return torch.rand(batch_size, generator=generator, device=device)

        def below(high: int) -> Tensor:
            return torch.randint(high, (batch_size,), generator=generator, device=device)

        rows = torch.multinomial(evenly, batch_size, replacement=True, generator=generator)
        other_rows = torch.multinomial(others_evenly, batch_size, replacement=True, generator=generator)
        other, recoloured, kind = draw() < OTHERS, (draw() < RECOLOURED).long(), draw()
        known = latents[recoloured, below(views), rows]
        clean = torch.where(other[:, None, None, None], other_latents[recoloured, 0, other_rows], known)
        context = states[(kind > PLAIN).long() + 2 * recoloured, rows]
        style = of_styles[torch.where(other, other_style_ids[other_rows], style_ids[rows])]
        context = torch.where((other | (kind > 1 - STYLE_ONLY))[:, None, None], style, context)
        context = torch.where((draw() < NO_TEXT)[:, None, None], no_text, context)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = below(scheduler.config["num_train_timesteps"])
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return {"loss": F.mse_loss(model(noisy, timesteps, context).sample.float(), target)}

    return losses
