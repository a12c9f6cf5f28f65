"""Who judges the generated images: a classifier of styles, one of concepts, colour histograms, and the stack's CLIP.

The classifiers are trained on the training images alone and are no part of what generates; how often they are right
on real held-out images is reported beside every number they give.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_trainer.demo.emoji import to_pixels
from ipadapter_trainer.demo.judges import SCALE, StyleClassifier, style_features

from .concepts import CONCEPTS
from .efficientnet import EfficientNet
from .images import Drawings, EmojiImages
from .loop import LossFunction, device_of, training_device
from .views import disguise

PALETTES = ((6, "ink"), (12, "ink"), (8, "outlines"), (8, "surfaces"))  # bins a channel, of which pixels


new_style_classifier = partial(StyleClassifier, palettes=PALETTES)


class ConceptClassifier(EfficientNet):
    """Pixels [B, 3, H, W] in [-1, 1] -> logits [B, C] over ``CONCEPTS``."""

    def __init__(self) -> None:
        super().__init__(len(CONCEPTS))


def only_known(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an EfficientNet over more labels, as that of a ``ConceptClassifier``: ``CONCEPTS`` come first."""
    return {key: value[: len(CONCEPTS)] if key.startswith("_fc.") else value for key, value in state.items()}


def last_layer(network: EfficientNet) -> dict[str, Tensor]:
    """The weights that say which label is which."""
    return {key: value for key, value in network.state_dict().items() if key.startswith("_fc.")}


def compressed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in about a byte a weight: int8 with a scale for each row, biases and norms in fp16, counts as they are.

    ``classifier_state`` takes it back.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if not value.is_floating_point():
            result[key] = value
        elif value.dim() < 2:
            result[key] = value.half()
        else:
            scale = value.flatten(1).abs().amax(1).clamp(min=1e-8).div(127).view(-1, *[1] * (value.dim() - 1)).half()
            result[key] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous()
            result[f"{key}{SCALE}"] = scale
    return result


def style_losses(images: EmojiImages, vae: AutoencoderKL, batch_size: int = 128) -> LossFunction:
    """Cross-entropy on real images and on their round trips through the autoencoder, half each.

    The round trips keep the classifier from reading the autoencoder's softness, which every generated image has,
    as a style.
    """
    device = device_of(vae)
    real = to_pixels(images.images)
    chunks = (chunk.to(device) for chunk in (*real.split(64), *round_trip(vae, real).split(64)))
    features = torch.cat([style_features(chunk, PALETTES) for chunk in chunks])
    labels = images.style_ids.repeat(2).to(device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, StyleClassifier)
        rows = torch.randint(len(features), (batch_size,), generator=generator, device=device)
        return _cross_entropy(model.head(features[rows]), labels[rows])

    return losses


def concept_losses(drawings: Drawings, batch_size: int = 64) -> LossFunction:
    """Cross-entropy on disguised drawings, with smoothed labels (arXiv 1512.00567)."""
    device = training_device()
    images, labels = drawings.images.to(device), drawings.concept_ids.to(device)
    draw_rows = drawings.sampler(batch_size, device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        rows = draw_rows(generator)
        pixels = disguise(to_pixels(images[rows]), generator).contiguous(memory_format=torch.channels_last)
        return _cross_entropy(model(pixels), labels[rows])

    return losses


def _cross_entropy(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits.float(), truth, label_smoothing=0.1)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == truth).float().mean()}


def concept_ids(images: EmojiImages) -> Tensor:
    """int64 [N]: the index of each image's concept in ``CONCEPTS``."""
    index = {concept: number for number, concept in enumerate(CONCEPTS)}
    return torch.tensor([index[concept] for concept in images.concepts])


@torch.no_grad()
def judge(classifier: nn.Module, pixels: Tensor) -> Tensor:
    """Logits [N, classes] of a classifier, for pixels in [-1, 1]."""
    return torch.cat([classifier(chunk) for chunk in pixels.split(64)])


def choose_among(logits: Tensor, candidates: Tensor) -> Tensor:
    """int64 [N]: the candidate with the highest logit, as an index into each row of ``candidates`` [N, K]."""
    return logits.gather(1, candidates).argmax(-1)


@torch.no_grad()
def round_trip(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the autoencoder gives them back, on the CPU."""
    chunks = (chunk.to(device_of(vae)) for chunk in pixels.split(64))
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample.cpu() for chunk in chunks]).clamp(-1, 1)
