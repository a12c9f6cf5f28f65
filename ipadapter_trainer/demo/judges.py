"""Who judges the generated images: a style classifier, colour histograms, and the stack's own CLIP.

The classifier is trained on the training images alone and is no part of what generates; its accuracy on real held-out
images is reported beside every number it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipadapter_core import AdapterError, looks_like
from ipadapter_core.tensors import check_weights

from ..errors import BaseModelError
from ..models.weight_files import open_weights
from .emoji import STYLE_NAMES

SCALE = "_scale"  # after the name of a tensor that is stored in int8
WHITE = 0.94  # a pixel whose darkest channel is above is background
# Bins a channel, of which pixels.
PALETTES = ((6, "ink"), (12, "ink"), (20, "ink"), (8, "outlines"), (8, "surfaces"))
STEPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5)  # between pixels in [-1, 1]


class StyleClassifier(nn.Module):
    """A small network over ``style_features``: pixels [B, 3, 64, 64] in [-1, 1] -> logits [B, 5] over ``STYLE_NAMES``.

    It cannot see what is drawn, only which colours and edges there are: a convolutional network of this size learns the
    few thousand images by heart before it tells the styles of others as well.
    """

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        inputs = sum(bins**3 for bins, _ in PALETTES) + len(STEPS) + 1
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(inputs, hidden), nn.SiLU(), nn.Dropout(0.3), nn.Linear(hidden, len(STYLE_NAMES))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(style_features(pixels))


# By the prefix of their tensors in judges.safetensors.
CLASSIFIERS: Mapping[str, Callable[[], nn.Module]] = {"style_classifier": StyleClassifier}


def style_features(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> [B, F], the square roots of shares of the ink.

    Palettes (joint RGB histograms of all ink, of outlines and of surfaces, see ``PALETTES``), and how steep the steps
    between neighbouring pixels are (``STEPS``): what flat, shaded and outlined drawing leave behind.
    """
    unit = (pixels.clamp(-1, 1) + 1) / 2
    ink = unit.amin(dim=1) < WHITE
    right = F.pad(pixels.diff(dim=-1).abs().amax(dim=1), (0, 1))
    below = F.pad(pixels.diff(dim=-2).abs().amax(dim=1), (0, 0, 0, 1))
    step = torch.maximum(right, below)
    where = {"ink": ink, "outlines": ink & (step > 0.25), "surfaces": ink & (step < 0.05)}
    shares = [_palette(unit, where[part], bins) for bins, part in PALETTES]
    kind = torch.bucketize(step, torch.tensor(STEPS, device=pixels.device))
    shares.append(_shares(kind, ink, len(STEPS) + 1))
    return torch.cat(shares, dim=-1).sqrt()


@torch.no_grad()
def judge_styles(classifier: StyleClassifier, pixels: Tensor) -> Tensor:
    """int64 [N]: the style of each image, pixels in [-1, 1]."""
    return torch.cat([classifier(chunk).argmax(-1) for chunk in pixels.split(64)])


def colour_histogram(pixels: Tensor, bins: int = 4) -> Tensor:
    """Joint RGB histogram [N, bins**3] of pixels in [-1, 1], each row summing to 1; the white background is left out.

    The background is the same in every image and would only dilute the distances.
    """
    unit = (pixels.clamp(-1, 1) + 1) / 2
    return _palette(unit, unit.amin(dim=1) < WHITE, bins)


def _palette(unit: Tensor, where: Tensor, bins: int) -> Tensor:
    """Joint RGB histogram [B, bins**3] of unit [B, 3, H, W] in 0..1, of the pixels ``where`` [B, H, W] is true."""
    index = (unit * bins).long().clamp(max=bins - 1)
    return _shares((index[:, 0] * bins + index[:, 1]) * bins + index[:, 2], where, bins**3)


def _shares(index: Tensor, where: Tensor, size: int) -> Tensor:
    """Share of each of ``size`` indices among the places of index [B, H, W] where ``where`` is true: [B, size]."""
    counts = torch.zeros(len(index), size, device=index.device)
    counts.scatter_add_(1, index.flatten(1), where.flatten(1).float())
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)


def histogram_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Histogram intersection in [0, 1] of every row of a [N, K] with every row of b [M, K]: [N, M]."""
    return torch.minimum(a[:, None], b[None]).sum(-1)


def closer_to_own(similarity: Tensor) -> float:
    """Share of (own, other) pairs in which row i is more similar to column i than to another column; a tie counts half.

    ``similarity`` [N, N]: row = generated image, column = reference. The mean over all others is the probability that
    a random other one loses; 0.5 is chance.
    """
    own = similarity.diagonal()[:, None]
    wins = (own > similarity).float() + 0.5 * (own == similarity).float()
    others = ~torch.eye(len(similarity), dtype=torch.bool)
    return wins[others].mean().item()


def read_judges(file: Path, classifiers: Mapping[str, Callable[[], nn.Module]] = CLASSIFIERS) -> dict[str, Tensor]:
    """The tensors of judges.safetensors: the classifiers', and CLIP's text projection.

    Raises BaseModelError for another file and for a damaged one.
    """
    source = "the package: install ip-adapter-kit anew"
    opened = open_weights(file, "the judges of the emoji model", source)
    expected = {"text_projection.weight"}
    for name, new_classifier in classifiers.items():
        expected |= {f"{name}.{key}" for key in new_classifier().state_dict()}
    if lacking := sorted(expected - set(opened.infos)):
        raise BaseModelError(
            f"{file}: looks like {looks_like(opened.infos)}; expected the judges of the emoji model ({lacking[0]} is "
            f"missing). Take it from {source}."
        )
    tensors = {name: opened.read(name) for name in opened.infos}
    try:
        check_weights(tensors, str(file))
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
