"""Who judges the generated images: a classifier of styles, one of concepts, colour histograms, and the stack's CLIP.

The classifiers are trained on training images and drawings alone and are no part of what generates; how often they are
right on real held-out images is reported beside every number they give.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_core import AdapterError, looks_like
from ipadapter_core.tensors import check_weights
from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, to_pixels
from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.models.weight_files import open_weights

from .concepts import CONCEPTS
from .efficientnet import EfficientNet
from .images import Drawings
from .loop import LossFunction, device_of, mixed_precision, training_device
from .unet import new_scheduler
from .vae import encode
from .views import disguise, retouch

STYLED = 2000  # drawings of each style that the judge of styles learns from, at most
REDRAWN = (50, 600)  # timesteps of the noise
SCALE = "_scale"  # after the name of a tensor that is stored in int8


class StyleClassifier(EfficientNet):
    """Pixels [B, 3, H, W] in [-1, 1] -> logits [B, 5] over ``STYLE_NAMES``."""

    def __init__(self) -> None:
        super().__init__(len(STYLE_NAMES))


class ConceptClassifier(EfficientNet):
    """Pixels [B, 3, H, W] in [-1, 1] -> logits [B, C] over ``CONCEPTS``."""

    def __init__(self) -> None:
        super().__init__(len(CONCEPTS))


JUDGES_FILE = "judges.safetensors"
# By the prefix of their tensors in it.
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"styles": StyleClassifier, "concepts": ConceptClassifier}


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


def read_judges(file: Path) -> dict[str, Tensor]:
    """The tensors of judges.safetensors: the classifiers', and CLIP's text projection.

    Raises BaseModelError for another file and for a damaged one.
    """
    source = "the repository of ip-adapter-kit"
    opened = open_weights(file, "the judges of the emoji model", source)
    expected = {"text_projection.weight"}
    for name, new_classifier in CLASSIFIERS.items():
        expected |= {f"{name}.{key}" for key in new_classifier().state_dict()}
    if lacking := sorted(expected - set(opened.infos)):
        raise BaseModelError(
            f"{file}: looks like {looks_like(opened.infos)}; expected the judges of the emoji model ({lacking[0]} is "
            f"missing). Take it from {source}."
        )
    tensors = {name: opened.read(name) for name in opened.infos}
    try:
        check_weights(tensors, str(file))
        for name in CLASSIFIERS:  # as float32: integers are not checked
            state = classifier_state(tensors, name)
            check_weights({f"{name}.{key}": value for key, value in state.items()}, str(file))
    except AdapterError as error:
        raise BaseModelError(str(error)) from error
    return tensors


def classifier_state(judges: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The float32 state of one classifier out of the tensors of judges.safetensors; int8 ones have a scale a row."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in judges.items() if key.startswith(prefix)}
    state: dict[str, Tensor] = {}
    for key, value in own.items():
        if not key.endswith(SCALE):
            scale = own.get(f"{key}{SCALE}")
            state[key] = value.float() if scale is None else value.float() * scale.float()
    return state


def style_losses(
    drawings: Drawings,
    vae: AutoencoderKL,
    unet: nn.Module,
    no_text: Tensor,
    batch_size: int = 64,
    most: int = STYLED,
) -> LossFunction:
    """Cross-entropy on drawings in the five styles, all alike often: half as they are, half as ``redrawn``.

    Those keep the classifier from reading the softness that every generated image has as a style.
    """
    device = device_of(vae)
    generator, chooser = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    found = [(drawings.style_ids == style).nonzero()[:, 0] for style in range(len(STYLE_NAMES))]
    rows = torch.cat([own[torch.randperm(len(own), generator=chooser)][:most] for own in found])
    images, labels = drawings.images[rows].to(device), drawings.style_ids[rows].to(device)
    again = torch.cat([redrawn(vae, unet, no_text, chunk, generator) for chunk in images.split(64)])
    both, evenly = torch.stack([images, again]), (1 / torch.bincount(labels).float())[labels]

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.multinomial(evenly, batch_size, replacement=True, generator=generator)
        kind = torch.randint(2, (batch_size,), generator=generator, device=device)
        pixels = retouch(to_pixels(both[kind, drawn]), generator).contiguous(memory_format=torch.channels_last)
        return _cross_entropy(model(pixels), labels[drawn])

    return losses


@torch.no_grad()
def redrawn(vae: AutoencoderKL, unet: nn.Module, no_text: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, 3, H, W]: what the UNet, without a text, takes the images for through more or less noise.

    ``no_text`` [1, 16, D] are the states of an empty text.
    """
    count, device, scheduler = len(images), device_of(vae), new_scheduler()
    with mixed_precision(device):
        latents = vae.config["scaling_factor"] * encode(vae, images).float()
        noise = torch.randn(latents.shape, generator=generator, device=device)
        timesteps = torch.randint(*REDRAWN, (count,), generator=generator, device=device)
        noisy: Any = scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        velocity = unet(noisy, timesteps, no_text.expand(count, -1, -1)).sample.float()
        alpha = scheduler.alphas_cumprod.to(device)[timesteps][:, None, None, None]
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity
        decoded: Any = vae.decode(clean / vae.config["scaling_factor"])
    return ((decoded.sample.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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
