"""The stack's UNet: SD1.5's sixteen cross-attention layers at a hundredth of its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ipadapter_trainer.demo.colours import colour_words
from ipadapter_trainer.demo.emoji import EmojiImages, styled_caption, to_pixels
from ipadapter_trainer.demo.views import LATENT, numbered_view, other_colours

from .clip import text_states
from .loop import LossFunction, training_device
from .vae import encode
from .vision import WIDTH

BATCH = 64
KINDS = (0.3, 0.15)  # shares of the captions that say what alone and how alone; the others say both, see ``say``
STYLE_ONLY = 1
NO_TEXT, COLOURED = 0.1, 0.5  # shares of the captions: none, with the colours
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


def encode_views(
    vae: AutoencoderKL, images: EmojiImages, views: int, generator: torch.Generator
) -> tuple[Tensor, list[list[str]]]:
    """[2, views, N, 4, H/8, W/8], scaled: the images in their own colours and recoloured; the first view of each is the
    image itself, the second its mirror image, the others are mirrored and shifted at random. And the colours, in words,
    of each of the 2 * views views.
    """
    device = generator.device
    latents: list[list[Tensor]] = [[], []]
    colours: list[list[list[str]]] = [[], []]
    for view in range(views):
        pixels = numbered_view(to_pixels(images.images.to(device)), view, generator)
        for recoloured, shown in enumerate((pixels, other_colours(pixels, generator))):
            latents[recoloured].append(encode(vae, shown))
            colours[recoloured].append(colour_words(shown))
    stacked = torch.stack([torch.stack(of) for of in latents]) * vae.config["scaling_factor"]
    return stacked, colours[0] + colours[1]


def say(images: EmojiImages, colours: Sequence[str] | None = None) -> list[list[str]]:
    """Captions of three kinds: what an image shows, how it is drawn, and both; with its colours when they are given."""
    words, nothing = colours or [""] * len(images), [""] * len(images)
    kinds = ((images.captions, nothing), (nothing, images.styles), (images.captions, images.styles))
    return [[styled_caption(*each) for each in zip(*kind, words, strict=True)] for kind in kinds]


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

    Of ``others``, images of what the model need not know, the caption says the style alone: without them a style is
    known by heart with each concept, and cannot be asked for where it was never seen. All styles are drawn equally
    often. Half of the captions say the colours, and those of recoloured images always do: so a caption can say all
    that an image prompt shows.
    """
    device = training_device()
    generator = torch.Generator(device).manual_seed(0)

    def states(texts: list[list[str]]) -> Tensor:
        return torch.stack([text_states(text_encoder, tokenizer, each) for each in texts]).to(device)

    def tables(of: EmojiImages, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [2 * views, N, ...], and text states [3, N, ...] and, with the colours, [2 * views, 3, N, ...]."""
        latents, colours = encode_views(vae, of, views, generator)
        return latents.flatten(0, 1), states(say(of)), torch.stack([states(say(of, words)) for words in colours])

    latents, plain, coloured = tables(images, views)
    other_latents, other_plain, other_coloured = tables(others, 1)
    evenly, others_evenly = (
        (1 / torch.bincount(ids).float())[ids].to(device) for ids in (images.style_ids, others.style_ids)
    )
    no_text = states([[""]])[0]
    shares = torch.tensor(KINDS, device=device).cumsum(0)
    scheduler: Any = new_scheduler()

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        def draw() -> Tensor:
            return torch.rand(batch_size, generator=generator, device=device)

        def below(high: int) -> Tensor:
            return torch.randint(high, (batch_size,), generator=generator, device=device)

        rows = torch.multinomial(evenly, batch_size, replacement=True, generator=generator)
        other_rows = torch.multinomial(others_evenly, batch_size, replacement=True, generator=generator)
        other, recoloured = (draw() < OTHERS)[:, None, None], draw() < RECOLOURED
        kind, view = torch.bucketize(draw(), shares), views * recoloured + below(views)
        clean = torch.where(other[..., None], other_latents[recoloured.long(), other_rows], latents[view, rows])
        silent = torch.where(other, other_plain[STYLE_ONLY, other_rows], plain[kind, rows])
        telling = torch.where(
            other, other_coloured[recoloured.long(), STYLE_ONLY, other_rows], coloured[view, kind, rows]
        )
        context = torch.where((recoloured | (draw() < COLOURED))[:, None, None], telling, silent)
        context = torch.where((draw() < NO_TEXT)[:, None, None], no_text, context)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = below(scheduler.config["num_train_timesteps"])
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return {"loss": F.mse_loss(model(noisy, timesteps, context).sample.float(), target)}

    return losses
