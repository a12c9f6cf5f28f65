"""Initialise an adapter from the text: its tokens are fitted to the captions' text states, and its values, by least
squares, to what the UNet's text attention adds for them.

The diffusion loss says little about what an image shows. From this start two minutes of training suffice for a tiny
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import AdapterSpec, IPAdapter

from ..models.base_model import BaseModel
from ..models.image_features import dropped_features
from ..training.objective import noisy_latents_and_target

NO_IMAGE = 0.1  # share of the rows that are of no image, whose text is empty
DRAWN, POSITIONS = 256, 48  # noisy images, and queries a layer and image, that the values are fitted to
RIDGE = 1e-3  # of the mean square of what is attended to


@dataclass(frozen=True, eq=False)
class Alignment:
    """Hidden states [N, 1 + patches, D] of images, and the text states [N, 16, E] that say what they show."""

    hidden_states: Tensor
    text_states: Tensor

    def with_no_image(self, base_model: BaseModel, spec: AdapterSpec, no_text: Tensor) -> Alignment:
        """The same, and an image that is dropped, as in the unconditional branch: its text states are ``no_text``."""
        rows = max(1, int(NO_IMAGE * len(self.hidden_states)))
        (none,) = dropped_features(base_model, spec)
        return Alignment(
            torch.cat([self.hidden_states, none.to(self.hidden_states).expand(rows, -1, -1)]),
            torch.cat([self.text_states, no_text.to(self.text_states).expand(rows, -1, -1)]),
        )

    def loss(self, adapter: IPAdapter, batch_size: int, generator: torch.Generator) -> Tensor:
        """How far the image tokens of a plus adapter are from those text states."""
        rows = torch.randint(len(self.hidden_states), (batch_size,), generator=generator, device=generator.device)
        tokens = adapter.encode(self.hidden_states[rows].float())
        return F.mse_loss(tokens.float(), self.text_states[rows].float())


@torch.no_grad()
def cancel_empty_text(
    base_model: BaseModel,
    adapter: IPAdapter,
    latents: Tensor,
    text_states: Tensor,
    no_text: Tensor,
    generator: torch.Generator,
) -> None:
    """Take out of the image values what attention to an empty text adds, so that image tokens that are a caption's
    states draw beside an empty text what the caption draws.

    ``latents`` [N, 4, h, w] and ``text_states`` [N, 16, E] are of the same images, ``no_text`` [1, 16, E].
    Attention(Q, K, V) of the empty text is added to that of the image (paper, eq. 5). It is fitted, by least squares in
    each head of each layer, as a linear function R of the states that a query attends to in a caption: W'_v = W_v - R.
    """
    device, unet = base_model.device, base_model.unet
    rows = torch.randint(len(latents), (DRAWN,), generator=generator, device=device)
    timesteps = torch.randint(base_model.num_train_timesteps, (DRAWN,), generator=generator, device=device)
    noise = torch.randn(latents[rows].shape, generator=generator, device=device)
    noisy, _ = noisy_latents_and_target(base_model.scheduler, latents[rows].float(), noise, timesteps)
    captions = text_states[rows].clone()
    captions[: int(NO_IMAGE * DRAWN)] = no_text
    modules: dict[str, Any] = dict(unet.named_modules())
    sums = {site.name: _Sums() for site in base_model.sites}
    hooks = [
        modules[name].register_forward_pre_hook(_observer(found, no_text), with_kwargs=True)
        for name, found in sums.items()
    ]
    try:
        for some in torch.arange(DRAWN, device=device).split(64):
            unet(noisy[some].to(base_model.dtype), timesteps[some], captions[some].to(base_model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    for found, (_, values) in zip(sums.values(), adapter.layers.pairs(), strict=True):
        weight: Any = values.weight
        weight -= found.solve().to(weight)


class _Sums:
    """The sums of a least-squares problem for each head: inputs [H, n, E] and targets [H, n, D]."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.targets: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = inputs.double(), targets.double()
        self.inputs = self.inputs + inputs.mT @ inputs
        self.targets = self.targets + inputs.mT @ targets

    def solve(self) -> Tensor:
        """The weight [H * D, E] of the linear function."""
        assert isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)
        ridge = RIDGE * self.inputs.diagonal(dim1=1, dim2=2).mean() * torch.eye(self.inputs.shape[-1]).to(self.inputs)
        return torch.linalg.solve(self.inputs + ridge, self.targets).mT.flatten(0, 1)


def _observer(sums: _Sums, no_text: Tensor) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    def observe(attention: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden_states, states = (
            inputs[0][:, :: max(1, inputs[0].shape[1] // POSITIONS)],
            options["encoder_hidden_states"],
        )

        def split(tensor: Tensor) -> Tensor:  # [B, L, H * D] -> [B, H, L, D]
            return tensor.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        query = split(attention.to_q(hidden_states))

        def attend(to: Tensor, values: Tensor) -> Tensor:
            scores = query @ split(attention.to_k(to)).mT * attention.scale
            return (scores.softmax(-1) @ values).transpose(0, 1).flatten(1, 2)

        empty = no_text.to(states)
        sums.add(attend(states, states.float()[:, None]), attend(empty, split(attention.to_v(empty))))

    return observe
