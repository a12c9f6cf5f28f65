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
from .images import EmojiImages
from .loop import LossFunction, device_of, training_device
from .vae import encode
from .vision import WIDTH

BATCH = 64
NO_TEXT, PLAIN, RECOLOURED = 0.1, 0.4, 0.25  # shares: without text; a caption without style; recoloured images
VIEWS = 4  # of each image in its own colours, and as many recoloured


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
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    batch_size: int = BATCH,
    views: int = VIEWS,
) -> LossFunction:
    """Plain v-prediction MSE over uniform timesteps; latents and text states are computed once, here.

    Recoloured images, whose captions say so, are there for the image prompts: their colours are not those that the
    concept usually has.
    """
    device = training_device()
    latents = encode_views(vae, images, views, torch.Generator(device).manual_seed(0))
    plain = list(images.captions)
    styled = [styled_caption(c, s) for c, s in zip(images.captions, images.styles, strict=True)]
    states = torch.stack(
        [
            text_states(text_encoder, tokenizer, [""]).expand(len(images), -1, -1),
            text_states(text_encoder, tokenizer, plain),
            text_states(text_encoder, tokenizer, styled),
            text_states(text_encoder, tokenizer, [f"{text}, recoloured" for text in plain]),
            text_states(text_encoder, tokenizer, [f"{text}, recoloured" for text in styled]),
        ]
    ).to(device)
    scheduler: Any = new_scheduler()

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def draw() -> Tensor:
            return torch.rand(batch_size, generator=generator, device=device)

        rows = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        recoloured = (draw() < RECOLOURED).long()
        clean = latents[recoloured, torch.randint(views, (batch_size,), generator=generator, device=device), rows]
        text = (draw() > NO_TEXT).long()
        caption = 1 + (draw() > PLAIN).long() + 2 * recoloured
        context = states[text * caption, rows]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = torch.randint(
            scheduler.config["num_train_timesteps"], (batch_size,), generator=generator, device=device
        )
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return {"loss": F.mse_loss(model(noisy, timesteps, context).sample.float(), target)}

    return losses
