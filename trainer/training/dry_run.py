"""`ipadapter train --dry-run`: what a training would need, computed on the meta device without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ipadapter_core import AdapterApplication, AdapterSpec, init_adapter, inject

from ..engine.denoiser import adapter_spec
from ..engine.inputs import open_base_model
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .setup import total_steps
from .sources import count_examples

# Bytes beside each float32 weight in training: its gradient and what the optimizer remembers of it.
_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedulefree": 8}
_FROZEN_BYTES = {"no": 4.0, "bf16": 2.0, "fp8": 1.0}
_VAE_LIVE = 4  # feature maps of the VAE's first level that are alive at once while it encodes


@dataclass(frozen=True)
class Cost:
    """Of one training step on one device. Floating point operations count a multiplication and an addition as two."""

    forward_flops: int
    flops: int  # forward and backward of the UNet and the adapter
    encoder_flops: int  # VAE, text and image encoders; 0 with a cache
    activation_bytes: int  # kept for the backward pass


@dataclass(frozen=True)
class Plan:
    """What `plan_training` found."""

    spec: AdapterSpec
    base: str
    examples: int | None  # None for shards
    steps: int
    trained: int  # parameters
    frozen: int  # parameters that stay in memory
    cost: Cost
    bytes: dict[str, int]  # expected memory by what needs it

    @property
    def memory(self) -> int:
        """Expected bytes in all."""
        return sum(self.bytes.values())


def plan_training(config: TrainConfig, processes: int = 1) -> Plan:
    """Check the settings, the base model's folder and the data, and count; no weight is read, nothing is written.

    Raises TrainerError as `train` would.
    """
    base_model = open_base_model(config)
    spec = adapter_spec(base_model, config.train_kind, config.tokens)
    examples = count_examples(config)
    cost = step_cost(base_model, spec, config)
    modules = _frozen_parts(base_model, cached=config.cache is not None, image=spec.image_width is not None)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    trained = sum(p.numel() for p in init_adapter(spec, device="meta").parameters())
    return Plan(
        spec=spec,
        base=base_model.name,
        examples=examples,
        steps=total_steps(config, examples, config.batch_size * processes),
        trained=trained,
        frozen=sum(parameters.values()),
        cost=cost,
        bytes=_memory(config, base_model, parameters, trained, cost),
    )


def step_cost(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Cost:
    """Count one batch of the settings on the meta device."""
    batch, side = config.batch_size, config.resolution // base_model.latent_scale
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    unet = base_model.meta_unet().requires_grad_(False)
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns of weights that stay in float32; there are none
    if config.gradient_checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    adapter = init_adapter(spec, device="meta", dtype=dtype)
    application = AdapterApplication(lora=adapter.lora)

    def forward() -> Tensor:
        application.key_values = adapter(*_meta_features(spec, batch, dtype))
        text = torch.zeros(batch, base_model.text_length, spec.context_width, device="meta", dtype=dtype)
        latents = torch.zeros(batch, base_model.latent_channels, side, side, device="meta", dtype=dtype)
        added = base_model.meta_conditions(batch)
        timesteps = torch.zeros(batch, device="meta")
        return unet(latents, timesteps, text, added_cond_kwargs=added).sample

    with inject(unet, application):
        with FlopCounterMode(display=False) as counter:
            predicted = forward()
            forward_flops = counter.get_total_flops()
            predicted.float().mean().backward()
        flops = counter.get_total_flops()
        with _saved_tensors([*unet.parameters()]) as saved, _flash_attention():
            forward()
    encoders = 0 if config.cache is not None else _encoder_flops(base_model, spec, config)
    return Cost(forward_flops, flops, encoders, saved())


def _meta_features(spec: AdapterSpec, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes: list[tuple[int, ...]] = []
    if spec.face_width is not None:
        shapes.append((batch, spec.face_width))
    if spec.image_width is not None and spec.feature == "image_embeds":
        shapes.append((batch, spec.image_width))
    elif spec.image_width is not None:
        shapes.append((batch, 257 if spec.kind != "full" else spec.tokens, spec.image_width))
    return tuple(torch.zeros(shape, device="meta", dtype=dtype) for shape in shapes)


@contextmanager
def _saved_tensors(frozen: Iterable[nn.Parameter]) -> Any:
    """Count the bytes that autograd keeps inside; a storage counts once, frozen weights not at all."""
    ignored = {p.untyped_storage()._cdata for p in frozen}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            kept[storage._cdata] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


class _FusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of a fused attention kernel, which never writes the attention matrix down."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _flash_attention() -> Any:
    """On the meta device PyTorch takes the attention apart; GPUs run it fused."""
    return patch.object(
        F, "scaled_dot_product_attention", lambda q, k, v, *args, **kwargs: _FusedAttention.apply(q, k, v)
    )


def _frozen_parts(base_model: BaseModel, *, cached: bool, image: bool) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"UNet": base_model.meta_unet()}
    if not cached:
        parts["VAE"] = base_model.meta_vae()
        parts["text"] = base_model.meta_text_encoders()
        if image:
            parts["image"] = base_model.meta_image_encoder()
    return parts


def _encoder_flops(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> int:
    batch, side = config.batch_size, config.resolution
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base_model.meta_vae().encode(torch.zeros(batch, 3, side, side, device="meta"))
        ids = torch.zeros(batch, base_model.text_length, device="meta", dtype=torch.long)
        for encoder in base_model.meta_text_encoders().children():
            encoder(ids)
        if spec.image_width is not None:
            encoder = base_model.meta_image_encoder()
            pixels = int(encoder.config.image_size)
            encoder(torch.zeros(batch, 3, pixels, pixels, device="meta"))
    return counter.get_total_flops()


def _memory(
    config: TrainConfig, base_model: BaseModel, parameters: dict[str, int], trained: int, cost: Cost
) -> dict[str, int]:
    half = 4 if config.mixed_precision == "no" else 2
    vae = 4 if base_model.vae_dtype == torch.float32 else 2
    width = {"UNet": _FROZEN_BYTES[config.mixed_precision], "VAE": vae, "text": half, "image": half}
    average = 4 if config.ema_decay else 0
    encoding = 0
    if config.cache is None:
        channels = base_model.vae_channels
        encoding = _VAE_LIVE * config.batch_size * channels * config.resolution**2 * vae
    return {
        "frozen weights": int(sum(count * width[name] for name, count in parameters.items())),
        "adapter, gradients and optimizer": trained * (4 + 4 + _OPTIMIZER_BYTES[config.optimizer] + average),
        # The VAE has finished when the UNet begins, so the larger of the two counts.
        "activations": max(cost.activation_bytes, encoding),
    }


def plan_text(config: TrainConfig, plan: Plan) -> str:
    """A `Plan` for people."""
    images = config.batch_size
    per_image = (plan.cost.flops + plan.cost.encoder_flops) / images
    found = "shards, of unknown length" if plan.examples is None else f"{plan.examples:,} pictures to train on"
    seen = plan.steps * images * config.gradient_accumulation
    encoders = "read from the cache" if config.cache is not None else f"{plan.cost.encoder_flops / 1e9 / images:,.1f}"
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in plan.bytes.items())
    rows = [
        ("adapter", plan.spec.describe()),
        ("parameters", f"{plan.trained / 1e6:.2f} M trained, {plan.frozen / 1e6:.1f} M frozen ({plan.base})"),
        ("data", found),
        ("steps", f"{plan.steps:,} of {images * config.gradient_accumulation} pictures a process: {seen:,} pictures"),
        ("work", f"{plan.cost.flops / 1e9 / images:,.1f} GFLOPs a picture forward and backward; encoders: {encoders}"),
        ("", f"{per_image * images * config.gradient_accumulation / 1e9:,.1f} GFLOPs a step and process"),
        ("memory", f"about {plan.memory / 1e9:.1f} GB a process: {parts}"),
        ("", "arithmetic: what is stored; allocators and kernels take 1 to 2 GB more on a GPU"),
        ("output", str(config.output)),
    ]
    return "\n".join(f"{name:<10}  {value}" for name, value in rows)
