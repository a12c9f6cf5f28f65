"""The stack's f8 autoencoder with latents of 4 channels, in the layout of SD1.5's AutoencoderKL."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import EmojiImages, to_pixels
from ipadapter_trainer.demo.views import mirror, shift

from .build import SIZE
from .loop import LossFunction, device_of
from .views import any_colours

BATCH = 32
MOST_NOISE = 0.6  # of the latents' own spread: about what a small UNet leaves in them
SIZE_WEIGHT = 3e-5  # keeps the latents from growing; their scale is free
POSTERIOR_STD = 0.02  # of a latent of unit variance: the encoder is certain
SD15_SCALING = 0.18215  # every SD1.5 tool multiplies latents by this


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


@torch.no_grad()
def open_identity_path(vae: AutoencoderKL) -> None:
    """Let colours pass from pixels to latents to pixels at step 0: residual branches start at zero, the rest near
    identity.

    From the default initialisation a small autoencoder spends its first thousands of steps finding that path.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith("conv2"):  # the last convolution of a residual branch
            nn.init.zeros_(module.weight)
        elif not name.endswith("conv1"):
            identity = nn.init.dirac_(torch.empty_like(module.weight))
            module.weight.mul_(0.3).add_(identity)


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


def only_decoder(vae: Any) -> Any:
    """Let only the decoder be trained: the latents, which a UNet has learned, stay as they are."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    return vae


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
def fold_scaling(vae: Any, images: Tensor) -> float:
    """Rescale the latent space inside the weights so that latents times 0.18215 have unit variance; returns the gain.

    Reconstructions do not change, and tools that assume SD1.5's constant work. ``images`` are uint8 [N, 3, H, W]. The
    posterior's variance, which the losses do not train, becomes a small constant (``POSTERIOR_STD``).
    """
    latents = encode(vae, images[:: max(1, len(images) // 512)])
    gain = 1.0 / (latents.std().item() * SD15_SCALING)
    mean, variance = slice(0, 4), slice(4, 8)
    vae.quant_conv.weight[mean] *= gain
    vae.quant_conv.bias[mean] *= gain
    vae.quant_conv.weight[variance] = 0
    vae.quant_conv.bias[variance] = 2 * math.log(POSTERIOR_STD / SD15_SCALING)
    vae.post_quant_conv.weight /= gain
    return gain


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """uint8 images, or pixels in [-1, 1], [N, 3, H, W] -> posterior means [N, 4, H/8, W/8] on the VAE's device, not
    yet multiplied by the scaling factor."""
    device = device_of(vae)
    chunks = (chunk.to(device) for chunk in images.split(batch_size))
    pixels = (to_pixels(chunk) if chunk.dtype == torch.uint8 else chunk for chunk in chunks)
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels])
