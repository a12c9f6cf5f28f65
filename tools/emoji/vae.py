"""The stack's f8 autoencoder with latents of 4 channels, in the layout of SD1.5's AutoencoderKL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import to_pixels

from ..shipped_emoji.loop import device_of
from ..shipped_emoji.vae import MOST_NOISE, SD15_SCALING, SIZE_WEIGHT, open_identity_path
from .build import SIZE
from .images import EmojiImages
from .loop import LossFunction
from .views import any_colours, mirror, shift

BATCH = 32


def new_vae(size: int) -> AutoencoderKL:
    """A small autoencoder; random weights around an identity path (see ``open_identity_path``)."""
    vae: Any = AutoencoderKL.from_config(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (16, 32, 64, 96),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,  # groups of one channel would normalise each image's colours away
            "sample_size": size,
            "scaling_factor": SD15_SCALING,
        }
    )
    open_identity_path(vae)
    return vae


def most_noise(size: int) -> float:
    """``MOST_NOISE`` at 128 px; smaller images have fewer latents, each of which has to carry more."""
    return MOST_NOISE * size / SIZE


def vae_losses(images: EmojiImages, batch_size: int, device: torch.device) -> LossFunction:
    """Absolute errors of the pixels, of their edges, and of the mean colour of each latent's 8x8 cell, through noise.

    The edges keep outlines sharp; the cells make the latents carry colour from the start, which pixel errors alone find
    only after thousands of steps. The noise, up to ``most_noise`` of the latents' spread, takes the place of a KL term:
    what a style is, exact colours and edges, must survive the errors that a UNet of this size makes.
    """
    uint8_images = images.images.to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(uint8_images), (batch_size,), generator=generator, device=device)
        pixels = any_colours(shift(mirror(to_pixels(uint8_images[rows]), generator), generator), generator)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = model.quant_conv(model.encoder(pixels)).chunk(2, dim=1)[0]  # type: ignore[operator]
        share = most_noise(images.size) * torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)
        noise = (share * torch.randn(latents.shape, generator=generator, device=device)).to(latents.dtype)
        decoded = model.decoder(model.post_quant_conv(latents + noise * latents.detach().std()))  # type: ignore[operator]
        terms = _reconstruction(decoded.float(), pixels)
        return {**terms, "loss": terms["loss"] + SIZE_WEIGHT * latents.float().square().mean()}

    return losses


def _reconstruction(output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    error = output - pixels
    pixel, cell = error.abs().mean(), F.avg_pool2d(error, 8).abs().mean()
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return {"loss": pixel + 2 * cell + edge, "l1": pixel.detach(), "cell": cell.detach()}


def decoder_losses(images: EmojiImages, vae: AutoencoderKL, batch_size: int, device: torch.device) -> LossFunction:
    """The reconstruction of ``vae_losses`` alone, with half its noise, from latents that are computed once, here."""
    pixels = torch.cat([images.images, images.images.flip(-1)]).to(device)
    latents = encode(vae, pixels)
    spread = latents.std()

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch_size,), generator=generator, device=device)
        share = most_noise(images.size) / 2 * torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)
        noise = share * spread * torch.randn(latents[rows].shape, generator=generator, device=device)
        decoded = model.decode(latents[rows] + noise).sample  # type: ignore[operator]
        return _reconstruction(decoded.float(), to_pixels(pixels[rows]))

    return losses


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """uint8 images, or pixels in [-1, 1], [N, 3, H, W] -> posterior means [N, 4, H/8, W/8] on the VAE's device, not
    yet multiplied by the scaling factor."""
    device = device_of(vae)
    chunks = (chunk.to(device) for chunk in images.split(batch_size))
    pixels = (to_pixels(chunk) if chunk.dtype == torch.uint8 else chunk for chunk in chunks)
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels])
