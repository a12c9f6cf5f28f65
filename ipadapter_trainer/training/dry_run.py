"""`ipadapter train --dry-run`: all checks of a training, and its expected work and memory, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ipadapter_core import AdapterSpec

from ..cache.plan import cache_settings, plan_shards
from ..data.buckets import Buckets
from ..data.examples import Example
from ..models.base_model import BaseModel
from ..runtime.disk import show_bytes
from ..runtime.folder_lock import Say, lock_folder
from ..settings.config import TrainConfig
from .checks import check_training, notes
from .cost import Cost, step_cost
from .new_adapter import adapter_spec
from .training_data import TrainingData

# Optimizer state in bytes per trained weight.
_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedulefree": 8}
_FROZEN_BYTES = {"no": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Plan:
    """Expected work and memory of a training."""

    spec: AdapterSpec
    base: str
    examples: int | None  # None for shards
    steps: int
    cost: Cost
    bytes: dict[str, int]  # expected memory by use
    cache: int | None  # bytes on disk of what `ipadapter cache` keeps; None for shards that stream

    @property
    def trained(self) -> int:
        """Parameters of the adapter."""
        return self.cost.trained_parameters

    @property
    def frozen(self) -> int:
        """Parameters of the frozen models that stay in memory."""
        return sum(self.cost.frozen_parameters.values())

    @property
    def memory(self) -> int:
        """Expected bytes in all."""
        return sum(self.bytes.values())


def dry_run(config: TrainConfig, say: Say) -> None:
    """Run all checks of `train`, and print the plan, the warnings and the checkpoint it would resume from.

    Raises TrainerError or AdapterError as `train` would.
    """
    with lock_folder(config.output, say):
        checked = check_training(config)
        if checked.accelerator.is_main_process:
            plan = plan_training(config, checked.base_model, checked.data, checked.steps)
            say(plan_text(config, plan, checked.images_per_batch * config.gradient_accumulation_steps))
            for line in notes(checked, "Would resume"):
                say(line)


def plan_training(config: TrainConfig, base_model: BaseModel, data: TrainingData, steps: int) -> Plan:
    """The plan of a training of `steps` steps. No weight is read, nothing is written."""
    spec = adapter_spec(base_model, config.train_kind, config.num_tokens)
    cost = step_cost(base_model, spec, config)
    return Plan(
        spec=spec,
        base=base_model.name,
        examples=data.size,
        steps=steps,
        cost=cost,
        bytes=_memory(config, base_model, cost),
        cache=None if data.examples is None else _cache_bytes(config, base_model, data.examples),
    )


def _cache_bytes(config: TrainConfig, base_model: BaseModel, examples: Sequence[Example]) -> int:
    """Buckets count as squares, whose areas differ by a few percent."""
    squares = Buckets.square(config.resolution, len(examples))
    shards = plan_shards(cache_settings(config, examples), base_model, examples, squares)
    return sum(shard.bytes for shard in shards)


def _memory(config: TrainConfig, base_model: BaseModel, cost: Cost) -> dict[str, int]:
    half = 4 if config.mixed_precision == "no" else 2
    vae = 4 if base_model.vae_dtype == torch.float32 else 2
    width = {"UNet": _FROZEN_BYTES[config.mixed_precision], "VAE": vae, "text": half, "image": half}
    average = 4 if config.ema_decay else 0
    copy = 0 if config.mixed_precision == "no" else 2  # what autocast computes with
    return {
        "frozen weights": sum(count * width[name] for name, count in cost.frozen_parameters.items()),
        "adapter, gradients and optimizer": cost.trained_parameters
        * (4 + 4 + _OPTIMIZER_BYTES[config.optimizer] + average + copy),
        "activations": cost.activation_bytes,
    }


def plan_text(config: TrainConfig, plan: Plan, images_per_step: int) -> str:
    """The text of a `Plan`. `images_per_step`: of all processes."""
    images = config.batch_size
    per_image = (plan.cost.flops + plan.cost.encoder_flops) / images
    found = "shards, of unknown length" if plan.examples is None else f"{plan.examples:,} images to train on"
    encoders = "read from the cache" if config.cache is not None else f"{plan.cost.encoder_flops / 1e9 / images:,.1f}"
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in plan.bytes.items())
    rows = [
        ("adapter", plan.spec.describe()),
        ("parameters", f"{plan.trained / 1e6:.2f} M trained, {plan.frozen / 1e6:.1f} M frozen ({plan.base})"),
        ("data", found),
        ("steps", f"{plan.steps:,} of {images_per_step:,} images: {plan.steps * images_per_step:,} images"),
        ("work", f"{plan.cost.flops / 1e9 / images:,.1f} GFLOPs an image forward and backward; encoders: {encoders}"),
        ("", f"{per_image * images * config.gradient_accumulation_steps / 1e9:,.1f} GFLOPs a step and process"),
        ("memory", f"about {plan.memory / 1e9:.1f} GB a process: {parts}"),
        ("", "arithmetic: what is stored; allocators and kernels take 1 to 2 GB more on a GPU"),
        ("cache", "" if plan.cache is None else f"{show_bytes(plan.cache)} on disk ({_with_or_without(config)})"),
        ("output", str(config.output)),
    ]
    return "\n".join(f"{name:<10}  {value}" for name, value in rows if value)


def _with_or_without(config: TrainConfig) -> str:
    return "`ipadapter cache` would write it" if config.cache is None else f"{config.cache}, used by this training"
