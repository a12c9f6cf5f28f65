"""The stack's autoencoder: 64 px <-> 8x8 latents of 4 channels, in the layout of SD1.5's AutoencoderKL."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import EmojiImages, augment, to_pixels

from .loop import LossFunction, device_of

BATCH = 8
MOST_NOISE = 0.6  # of the latents' own spread: about what a small UNet leaves in them
SIZE_WEIGHT = 3e-5  # keeps the latents from growing; their scale is free
POSTERIOR_STD = 0.02  # of a latent of unit variance: the encoder is certain
SD15_SCALING = 0.18215  # every SD1.5 tool multiplies latents by this


def new_vae() -> AutoencoderKL:
    """A small f8 autoencoder; random weights around an identity path (see ``open_identity_path``)."""
    vae: Any = AutoencoderKL.from_config(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (16, 32, 64, 96),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,  # narrow groups would normalise each image's colours away
            "sample_size": 64,
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


def _edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def vae_losses(images: EmojiImages, batch_size: int = BATCH) -> LossFunction:
    """Absolute errors of the pixels, of their edges, and of the mean colour of each latent's 8x8 cell, through noise.

    The edges keep outlines sharp; the cells make the latents carry colour from the start, which pixel errors alone find
    only after thousands of steps. The noise, up to ``MOST_NOISE`` of the latents' spread, takes the place of a KL term:
    what a style is, exact colours and edges, must survive the errors that a UNet of this size makes.
    """

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        pixels = augment(to_pixels(images.images[rows]), generator).to(device_of(model))
        latents = model.encode(pixels).latent_dist.mean  # type: ignore[operator]
        share = MOST_NOISE * torch.rand(batch_size, 1, 1, 1, generator=generator)
        noise = (share * torch.randn(latents.shape, generator=generator)).to(latents)
        terms = _reconstruction(model.decode(latents + noise * latents.std()).sample, pixels)  # type: ignore[operator]
        return {**terms, "loss": terms["loss"] + SIZE_WEIGHT * latents.square().mean()}

    return losses


def _reconstruction(output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    pixel, cell = F.l1_loss(output, pixels), F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(pixels, 8))
    edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(output), _edges(pixels), strict=True))
    return {"loss": pixel + 2 * cell + edge, "l1": pixel.detach(), "cell": cell.detach()}


def only_decoder(vae: Any) -> Any:
    """Let only the decoder be trained: the latents, which a UNet has learned, stay as they are."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    return vae


def decoder_losses(images: EmojiImages, vae: AutoencoderKL, batch_size: int = BATCH) -> LossFunction:
    """The reconstruction of ``vae_losses`` alone, from latents that are computed once, here."""
    pixels = torch.cat([to_pixels(images.images), to_pixels(images.images.flip(-1))])
    latents = encode_views(vae, images, 2).flatten(0, 1)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        device = device_of(model)
        return _reconstruction(model.decode(latents[rows].to(device)).sample, pixels[rows].to(device))  # type: ignore[operator]

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
    """uint8 images [N, 3, 64, 64] -> posterior means [N, 4, 8, 8] on the CPU, not yet multiplied by the scaling
    factor."""
    return _means(vae, to_pixels(images), batch_size)


@torch.no_grad()
def _means(vae: Any, pixels: Tensor, batch_size: int = 64) -> Tensor:
    device = device_of(vae)
    return torch.cat([vae.encode(chunk.to(device)).latent_dist.mean.cpu() for chunk in pixels.split(batch_size)])


def encode_views(vae: AutoencoderKL, images: EmojiImages, views: int) -> Tensor:
    """[views, N, 4, 8, 8]: the posterior means of the images, their mirror images, and some shifted at random."""
    generator = torch.Generator().manual_seed(0)
    shifted = (augment(to_pixels(images.images), generator) for _ in range(views - 2))
    plain = to_pixels(images.images)
    return torch.stack([_means(vae, pixels) for pixels in (plain, plain.flip(-1), *shifted)])
