"""Validation: whether the adapter uses its image prompt, measured on held-out examples.

The training loss barely shows it: the base model alone reaches nearly the same loss, and random timesteps hide the
rest. So every validation uses the same noise and timesteps, and compares the loss with the right image prompt to the
losses without one and with that of another example.
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

QUARTERS = 4  # of the noise schedule; each example has one timestep in each
SEED = 0
GRID_SIDES = (128, 256)  # smallest and largest side of a sample in the grid, in pixels


@dataclass(frozen=True, eq=False)
class Samples:
    """Settings of the grid of samples. `images`: image prompts and captions of the first held-out examples. `text`: a
    prompt for one more column, none if empty. `scheduler` replaces the base model's noise schedule.
    """

    images: Sequence[tuple[Image.Image, str]]
    text: str = ""
    steps: int = 20
    guidance: float = 5.0
    seed: int = SEED
    scheduler: DDPMScheduler | None = None


class Validation:
    """V held-out examples, encoded, with fixed timesteps and noise. `chunk`: rows per UNet call.

    The result does not depend on the number of processes, and global random states are not changed.
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
        """Losses, differences of losses ("gaps"), and the strength of the image attention:

        - "validation/loss": with the right image, as in training, without dropout
        - "validation/loss_no_image": the base model without adapter
        - "validation/loss_dropped": with a dropped image, as in the negative branch of guidance
        - "validation/loss_shuffled": with the image of another example
        - "validation/gap_no_image", "validation/gap_shuffled": those losses minus the loss; above 0 the image helps
        - "validation/gap_shuffled_error": the standard error of that gap over the examples
        - "validation/loss_t0" to "_t3" and "validation/gap_shuffled_t0" to "_t3": by quarter of the noise schedule,
          t0 nearest to the clean image
        - "validation/attention_ratio": norm of the image attention divided by that of the text attention, mean
          over the layers (each in `layer_ratios`)

        Those with "shuffled" are left out if all examples have the same image.
        """
        ratios: dict[int, list[Tensor]] = {}
        with self._as_in_training():
            if self._no_image is None:  # the base model is frozen
                # An application that is not in the UNet, so the injected one stays disabled.
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
        """A grid of images with fixed seeds, a row per held-out example. Columns: its image prompt, the base model with
        its caption, the image alone, both, and the image with the text of `Samples`. None without samples.

        `adapter` is not wrapped by Accelerate; the application of the training stays disabled meanwhile.
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
        """Losses [QUARTERS, V]; `others` [V]: examples whose image prompts are used instead."""
        losses = []
        for rows in torch.arange(len(self._rows)).split(self._chunk):
            examples = self._rows[rows]
            batch = TrainBatch(
                self._examples.index(examples),
                torch.full((len(rows),), drop),
                self._noise[rows],
                self._timesteps[rows],
            )
            replaced = None if others is None else self._examples.index(others[examples]).image_features
            losses.append(model.sample_losses(batch, replaced).float())
        return torch.cat(losses).view(QUARTERS, -1).cpu()

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """The precision of the training steps, without torch.compile: new batch sizes would take minutes to compile."""
        device, dtype = self.base_model.device.type, self.base_model.dtype
        with _uncompiled(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            yield

    def _generated(self, adapter: IPAdapter | None, texts: TextStates) -> list[Image.Image]:
        """Images of these texts and, with an adapter, the image prompts of the first examples."""
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
    """For each of V examples the next one (cyclic) with another image: int64 [V]; None if all images are equal."""
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
