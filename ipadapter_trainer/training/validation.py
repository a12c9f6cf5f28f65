"""What an adapter has learnt, on examples that it is not trained on.

The training loss says next to nothing: the base model alone is nearly as low, and the noise of the timesteps hides the
rest. So the same examples are noised the same way every time, and the loss with the right image is set against the
loss without one and with another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from ipadapter_core import AdapterApplication, IPAdapter

from ..data.images import to_pil_images
from ..models.base_model import BaseModel
from ..models.conditioning import TextStates, encode_prompts
from ..models.features import Features
from ..models.generate import generate
from ..report.image_grid import draw_grid
from .adapted_unet import AdaptedUNet, TrainBatch

QUARTERS = 4  # of the noise schedule; every example is looked at once in each
SEED = 0
GRID_SIDES = (128, 256)  # pixels; samples are shown no smaller and no larger


@dataclass(frozen=True, eq=False)
class Samples:
    """What the grid of samples shows. `images` are the image prompts and captions of the first held-out examples;
    `text` is one for all, left out when empty. `scheduler` replaces the base model's noise schedule.
    """

    images: Sequence[tuple[Image.Image, str]]
    text: str = ""
    steps: int = 20
    guidance: float = 5.0
    seed: int = SEED
    scheduler: DDPMScheduler | None = None


class Validation:
    """Held-out examples at fixed timesteps with fixed noise. `examples` are V of them, encoded, with the features of
    the right image. `chunk` is how many rows the UNet takes at once.

    Nothing of it depends on the number of processes, and no random state is touched.
    """

    def __init__(
        self,
        base_model: BaseModel,
        examples: Features,
        *,
        sample: Samples | None = None,
        chunk: int = 8,
    ) -> None:
        self.base_model = base_model
        self.layer_ratios: dict[int, float] = {}  # of the newest `measure`, by layer id
        self._examples, self._chunk, self._sample = examples, chunk, sample
        count, generator = len(examples), torch.Generator().manual_seed(SEED)
        self._rows = torch.arange(count).repeat(QUARTERS)
        self._timesteps = stratified_timesteps(count, base_model.num_train_timesteps, generator)
        self._noise = torch.randn(len(self._rows), *examples.latents.shape[1:], generator=generator)
        self._others = other_rows(examples.image_features)
        self._no_image: Tensor | None = None
        texts = [] if sample is None else ["", sample.text]  # once, while the text encoders are there
        self._texts = {text: encode_prompts(base_model, [text]) for text in texts}

    @torch.no_grad()
    def measure(self, model: AdaptedUNet) -> dict[str, float]:
        """Losses, their gaps, and the strength of the image attention, by name:

        - "validation/loss": with the right image, as in training, without dropout
        - "validation/loss_no_image": the base model without adapter
        - "validation/loss_dropped": the adapter with a dropped image, which guidance takes as the negative one
        - "validation/loss_shuffled": with the image of another example
        - "validation/gap_no_image", "validation/gap_shuffled": those losses less the loss; above 0 the image helps
        - "validation/gap_shuffled_error": the standard error of that gap over the examples
        - "validation/loss_t0" to "_t3" and "validation/gap_shuffled_t0" to "_t3": by quarter of the noise schedule,
          t0 nearest to the clean image
        - "validation/attention_ratio": the norm of the image attention as a share of the text attention's, the mean
          over the layers (`layer_ratios` has them)

        The shuffled ones are left out when all examples have the same image.
        """
        ratios: dict[int, list[Tensor]] = {}
        with self._as_in_training():
            if self._no_image is None:  # the base model is frozen
                # The application in the UNet rests; this one is nowhere.
                self._no_image = self._losses(dataclasses.replace(model, application=AdapterApplication()))
            with _observing(model.application, ratios):
                right = self._losses(model)
            dropped = self._losses(model, drop=True)
            shuffled = None if self._others is None else self._losses(model, self._others)
        model.disable_adapter()
        self.layer_ratios = {id: torch.cat(ratios[id]).mean().item() for id in sorted(ratios)}
        numbers = {
            "loss": right,
            "loss_no_image": self._no_image,
            "loss_dropped": dropped,
            "gap_no_image": self._no_image - right,
            **{f"loss_t{quarter}": rows for quarter, rows in enumerate(right)},
        }
        if shuffled is not None:
            gap = shuffled - right
            numbers |= {"loss_shuffled": shuffled, "gap_shuffled": gap}
            numbers |= {f"gap_shuffled_t{quarter}": rows for quarter, rows in enumerate(gap)}
            numbers["gap_shuffled_error"] = gap.mean(0).std() / math.sqrt(gap.shape[1])
        measured = {f"validation/{name}": value.mean().item() for name, value in numbers.items()}
        if self.layer_ratios:
            measured["validation/attention_ratio"] = sum(self.layer_ratios.values()) / len(self.layer_ratios)
        return measured

    def samples(self, adapter: IPAdapter) -> Image.Image | None:
        """A grid with fixed seeds: one row a held-out example, one column each for its image prompt, the base model
        with its caption, the image alone, both, and the image with the text of `Samples`. None without samples.

        The adapter is the plain one; the one in training rests in the UNet meanwhile.
        """
        sample = self._sample
        if sample is None or not sample.images:
            return None
        prompts, captions = zip(*sample.images, strict=True)
        of_captions = self._examples.text.index(torch.arange(len(captions)))
        none, given = (self._texts[text].expand(len(captions)) for text in ("", sample.text))
        columns = [("image prompt", prompts)]
        with self.base_model.temporarily_loaded(), _uncompiled():
            columns += [
                ("caption only", self._generated(None, of_captions)),
                ("image only", self._generated(adapter, none)),
                ("image + caption", self._generated(adapter, of_captions)),
            ]
            if sample.text:
                columns.append((f'image + "{sample.text}"', self._generated(adapter, given)))
        smallest, largest = GRID_SIDES
        return draw_grid(columns, side=max(smallest, min(largest, max(self._size))), labels=captions)

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of the examples in pixels."""
        height, width = self._examples.latents.shape[-2:]
        return height * self.base_model.latent_scale, width * self.base_model.latent_scale

    def _losses(self, model: AdaptedUNet, others: Tensor | None = None, drop: bool = False) -> Tensor:
        """[QUARTERS, V]; `others` [V] are the examples whose images are shown instead."""
        losses = []
        for rows in torch.arange(len(self._rows)).split(self._chunk):
            examples = self._rows[rows]
            batch = TrainBatch(
                self._examples.index(examples),
                torch.full((len(rows),), drop),
                self._noise[rows],
                self._timesteps[rows],
            )
            shown = None if others is None else self._examples.index(others[examples]).image_features
            losses.append(model.sample_losses(batch, shown).float())
        return torch.cat(losses).view(QUARTERS, -1).cpu()

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """In the precision of the steps, but not compiled: other batch sizes would cost minutes of compilation."""
        device, dtype = self.base_model.device.type, self.base_model.dtype
        with _uncompiled(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            yield

    def _generated(self, adapter: IPAdapter | None, texts: TextStates) -> list[Image.Image]:
        """Images of the first examples beside these texts; without adapter of the texts alone."""
        sample = self._sample
        assert sample is not None
        images: list[Image.Image] = []
        for rows in torch.arange(len(texts)).split(self._chunk):
            features = self._examples.image_features
            pixels = generate(
                self.base_model,
                adapter,
                prompts=texts.index(rows),
                image_features=None if adapter is None else tuple(feature[rows] for feature in features),
                negative_prompt=self._texts[""],
                steps=sample.steps,
                guidance=sample.guidance,
                seed=sample.seed + int(rows[0]),
                size=self._size,
                scheduler=sample.scheduler,
            )
            images += to_pil_images(pixels)
        return images


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [QUARTERS * count], quarter by quarter of the noise schedule, evenly spread within each."""
    drawn = []
    for quarter in range(QUARTERS):
        places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        drawn.append((quarter + places / count) / QUARTERS)
    return (torch.cat(drawn) * timesteps).long().clamp(max=timesteps - 1)


def other_rows(image_features: Sequence[Tensor]) -> Tensor | None:
    """For each of V examples the next one, around the end, with another image: int64 [V]; None when all are alike."""
    count = len(image_features[0])
    others = []
    for row in range(count):
        following = ((row + step) % count for step in range(1, count))
        other = next((o for o in following if any(not torch.equal(f[row], f[o]) for f in image_features)), None)
        if other is None:
            return None
        others.append(other)
    return torch.tensor(others)


@contextmanager
def _observing(application: AdapterApplication, ratios: dict[int, list[Tensor]]) -> Iterator[None]:
    """Collect, by layer id, the ratios [B] of the norms of the image and the text attention."""

    def observe(layer_id: int, text: Tensor, image: Tensor) -> None:
        norms = [attention.float().flatten(1).norm(dim=1) for attention in (image, text)]
        ratios.setdefault(layer_id, []).append(norms[0] / norms[1])

    application.observe = observe
    try:
        yield
    finally:
        application.observe = None


def _uncompiled() -> AbstractContextManager[Any]:
    set_stance: Any = getattr(torch.compiler, "set_stance", None)  # from PyTorch 2.6 on
    return nullcontext() if set_stance is None else set_stance("force_eager")
