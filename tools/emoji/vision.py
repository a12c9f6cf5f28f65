"""The image encoder: a CLIP vision tower that learns from a convolutional teacher what a drawing shows.

A small transformer knows a thousand images by heart and no others. A teacher that has seen ImageNet generalises, and
says more of each view than its label (DeiT, arXiv 2012.12877; "a patient and consistent teacher", arXiv 2106.05237).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ipadapter_core.build import build_projector
from ipadapter_trainer.demo.emoji import STYLE_NAMES, normalize, to_pixels
from ipadapter_trainer.demo.views import mirror, shift
from ipadapter_trainer.settings.kinds import TRAIN_KINDS, spec_for

from .concepts import CONCEPTS
from .efficientnet import MAP_WIDTH, EfficientNet
from .images import Drawings
from .loop import LossFunction, training_device
from .views import blend, disguise, patchwork, zoom

WIDTH = 128  # of the text states and of all embeddings
PATCHES = 8  # a side
CELLS = 4  # a side: the colours that a patch's state is asked for
HIDDEN, LAYERS, HEADS = 160, 5, 5
SAID = 10  # weight of the projector's loss
PARTS = 2  # The patches of a view are seen in so many parts: less is learned by heart (FLIP, arXiv 2212.00794)


def new_image_encoder(size: int) -> CLIPVisionModelWithProjection:
    """A vision tower over images of ``size`` pixels a side; random weights."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=size,
        patch_size=size // PATCHES,
        projection_dim=WIDTH,
    )
    return CLIPVisionModelWithProjection(config)


class VisionTower(nn.Module):
    """The image encoder, and heads that say what is in its states; only the encoder is exported.

    What an adapter gets must hold everything: the heads of ``patches`` read the penultimate states, which a plus
    adapter is given, those of ``image`` the projected embedding, which a base adapter is given. ``projector`` is that
    of a plus adapter: its tokens are the text states of what an image shows. Trained after the encoder instead of
    with it, it overfits.
    """

    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.encoder = new_image_encoder(size)
        self.patches = _heads(HIDDEN, labels)
        self.image = _heads(WIDTH, labels)
        self.map = nn.Linear(HIDDEN, MAP_WIDTH)
        self.colours = nn.Linear(HIDDEN, 3 * CELLS**2)
        shape = spec_for(
            TRAIN_KINDS["plus"], [], WIDTH, image_embeds_dim=WIDTH, hidden_dim=HIDDEN, image_tokens=1 + PATCHES**2
        )
        self.projector = build_projector(shape)

    def states(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] -> penultimate states [B, 1 + patches, D] and image embeddings [B, E], of all
        patches or of the ``kept`` ones [B, K].
        """
        states, pooled = run_tower(self.encoder.vision_model, pixels, kept)
        return states, self.encoder.visual_projection(pooled)

    def known_answers(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, concepts], over ``CONCEPTS``, and [B, 5] of the style, by the penultimate states."""
        concept, style = (head(states.mean(dim=1)).float() for head in self.patches.values())
        return concept[:, : len(CONCEPTS)], style


def _heads(width: int, labels: int) -> nn.ModuleDict:
    def head(outputs: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    return nn.ModuleDict({"concept": head(labels), "style": head(len(STYLE_NAMES))})


def run_tower(vision: Any, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A CLIP vision model on pixels [B, 3, H, W] in [-1, 1]: its penultimate states [B, 1 + patches, D] and its pooled
    output [B, D], of all patches or of the ``kept`` ones [B, K].
    """
    tokens = vision.embeddings(normalize(pixels))
    if kept is not None:
        chosen = tokens.gather(1, 1 + kept[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], chosen], dim=1)
    states = vision.pre_layrnorm(tokens)
    *layers, last = vision.encoder.layers
    for layer in layers:
        states = _run(layer, states)
    return states, vision.post_layernorm(_run(last, states)[:, 0])


def _run(layer: nn.Module, states: Tensor) -> Tensor:
    output = layer(states, attention_mask=None)
    return output if isinstance(output, Tensor) else output[0]  # older transformers return a tuple


@dataclass(frozen=True, eq=False)
class Said:
    """The text states [concepts, styles, 16, D] of what an image can show and how it can be drawn, and which of them
    say that: 1 or 0 [concepts, styles, 16, 1]. The others come after it: in a whole caption, they say the colours.
    """

    states: Tensor
    counted: Tensor

    def error(self, tokens: Tensor, concepts: Tensor, styles: Tensor) -> Tensor:
        """The mean squared error of image tokens [B, 16, D] of images of ``concepts`` [B] in ``styles`` [B]."""
        wanted, counted = self.states[concepts, styles], self.counted[concepts, styles]
        return ((tokens.float() - wanted).square() * counted).sum() / (counted.sum() * wanted.shape[-1])


def vision_losses(drawings: Drawings, teacher: EfficientNet, said: Said, batch_size: int = 64) -> LossFunction:
    """Five losses: the teacher's probabilities, its map of what is where, the styles, the colours of each patch, and
    the text states of what the teacher finds.

    A quarter of a batch are natural views, half of them zoomed. The others are disguised: a third of them are
    patchworks of two, and in a third another image shines through.
    The tower sees one half of a view's patches, then the other: the teacher, which takes longer, looks at it once.
    """
    device = training_device()
    images, styles = drawings.images.to(device), drawings.style_ids.to(device)
    teacher.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher.eval().requires_grad_(False)
    natural, draw_rows = math.ceil(batch_size / 4), drawings.sampler(batch_size, device)

    def losses(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, VisionTower)
        rows = draw_rows(generator)
        pixels = to_pixels(images[rows])
        crisp = shift(mirror(pixels[:natural], generator), generator)
        zoomed = zoom(crisp[natural // 2 :], generator)
        hidden = disguise(pixels[natural:], generator)
        third = len(hidden) // 3
        partners = hidden[len(hidden) - third :]
        patched = patchwork(hidden[:third], partners, generator)
        blended = blend(hidden[third : 2 * third], partners, generator)
        views = torch.cat([crisp[: natural // 2], zoomed, patched, blended, hidden[2 * third :]])
        with torch.no_grad():
            logits, there = teacher.logits_and_map(views.contiguous(memory_format=torch.channels_last))
            wanted = logits.float().softmax(-1)
            concepts = logits[:, : len(CONCEPTS)].argmax(-1).repeat(PARTS)
            there = F.interpolate(there.float(), (PATCHES, PATCHES), mode="bilinear").flatten(2).transpose(1, 2)
            there = F.layer_norm(there, there.shape[-1:])
        order = torch.rand(len(views), PATCHES**2, generator=generator, device=device).argsort(dim=1)
        kept = torch.cat(order.chunk(PARTS, dim=1))
        views, there, wanted = (t.repeat(PARTS, *[1] * (t.dim() - 1)) for t in (views, there, wanted))
        states, embeds = model.states(views, kept)
        of_kept = kept[..., None]
        map_error = F.mse_loss(model.map(states[:, 1:]).float(), there.gather(1, of_kept.expand(-1, -1, MAP_WIDTH)))
        colours = patch_colours(views).gather(1, of_kept.expand(-1, -1, 3 * CELLS**2))
        colour_error = F.l1_loss(model.colours(states[:, 1:]).float(), colours)
        concept = style = colour_error.new_zeros(())
        for heads, read in ((model.patches, states.mean(dim=1)), (model.image, embeds)):
            concept = concept - (wanted * heads["concept"](read).float().log_softmax(-1)).sum(-1).mean()
            of_natural = heads["style"](read.unflatten(0, (PARTS, -1))[:, :natural]).float()
            truth = styles[rows[:natural]].repeat(PARTS)
            style = style + F.cross_entropy(of_natural.flatten(0, 1), truth, ignore_index=-1)
        style = style.nan_to_num()  # a batch without any style
        with torch.no_grad():
            found = model.patches["style"](states.mean(dim=1).unflatten(0, (PARTS, -1)).mean(dim=0)).argmax(-1)
            found[:natural] = torch.where(styles[rows[:natural]] < 0, found[:natural], styles[rows[:natural]])
        said_error = said.error(model.projector(states), concepts, found.repeat(PARTS))
        return {
            "loss": concept + style + map_error + 2 * colour_error + SAID * said_error,
            "said": said_error.detach(),
            "concept": concept.detach(),
            "style": style.detach(),
            "map": map_error.detach(),
            "patches": colour_error.detach(),
        }

    return losses


def patch_colours(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3 * CELLS**2]: the mean colours of each patch's cells."""
    cells = F.adaptive_avg_pool2d(pixels, PATCHES * CELLS)
    return F.unfold(cells, CELLS, stride=CELLS).transpose(1, 2)
