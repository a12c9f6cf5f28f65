"""The work and the memory of a training step, counted on the meta device without reading a weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ipadapter_core import AdapterApplication, AdapterSpec, IPAdapter, inject

from ..models.base_model import BaseModel
from ..models.frozen import release_conv_inputs
from ..models.generate import decode_rows
from ..settings.config import TrainConfig


@dataclass(frozen=True)
class Cost:
    """Of one training step on one device. Floating point operations count a multiplication and an addition as two."""

    forward_flops: int
    flops: int  # forward and backward of the UNet and the adapter
    encoder_flops: int  # VAE, text and image encoders; 0 with a cache
    activation_bytes: int  # the most beside weights, gradients and optimizer: in the step, the encoders or a sample


def step_cost(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Cost:
    """Count one batch of the settings on the meta device."""
    batch, side = config.batch_size, config.resolution // base_model.latent_scale
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    unet = base_model.meta_unet().requires_grad_(False)
    nn.Module.to(unet, dtype)  # diffusers' own `to` warns of weights that stay in float32; there are none
    if config.mixed_precision != "fp8" and not config.compile:
        release_conv_inputs(unet)  # as in the training
    if config.gradient_checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    with torch.device("meta"):
        adapter = IPAdapter(spec).to(dtype)
    application = AdapterApplication(lora=adapter.lora, rows=range(batch))

    def forward() -> Tensor:
        application.key_values = adapter(*_meta_features(base_model, spec, batch, dtype))
        text = torch.zeros(batch, base_model.text_length, spec.cross_attention_dim, device="meta", dtype=dtype)
        latents = torch.zeros(batch, base_model.latent_channels, side, side, device="meta", dtype=dtype)
        added = base_model.meta_conditions(batch)
        timesteps = torch.zeros(batch, device="meta")
        return unet(latents, timesteps, text, added_cond_kwargs=added).sample

    for parameter in adapter.parameters():
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    with inject(unet, application), metered([*unet.parameters(), *adapter.parameters()]) as step:
        predicted = forward()
        forward_flops = step.flops
        predicted.float().mean().backward()
    # One after the other, so the largest counts.
    most, encoder_flops = max(step.most_bytes, _sampling_bytes(base_model, config)), 0
    if config.cache is None:
        encoders = _encoder_meter(base_model, spec, config)
        most, encoder_flops = max(most, encoders.most_bytes), encoders.flops
    return Cost(forward_flops, step.flops, encoder_flops, most)


def _meta_features(base_model: BaseModel, spec: AdapterSpec, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes: list[tuple[int, ...]] = []
    if spec.face_dim is not None:
        shapes.append((batch, spec.face_dim))
    if spec.image_dim is not None and spec.feature == "image_embeds":
        shapes.append((batch, spec.image_dim))
    elif spec.image_dim is not None:
        shapes.append((batch, base_model.image_tokens, spec.image_dim))
    return tuple(torch.zeros(shape, device="meta", dtype=dtype) for shape in shapes)


def _encoder_meter(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Meter:
    """What the frozen encoders do with one batch."""
    batch, side = config.batch_size, config.resolution
    vae, texts = base_model.meta_vae(), base_model.meta_text_encoders()
    image = base_model.meta_image_encoder() if spec.image_dim is not None else None
    nn.Module.to(vae, base_model.vae_dtype)
    modules = nn.ModuleList([texts, *([] if image is None else [image])])
    nn.Module.to(modules, base_model.dtype)
    with torch.no_grad(), metered([*vae.parameters(), *modules.parameters()]) as meter:
        vae.encode(torch.zeros(batch, 3, side, side, device="meta", dtype=base_model.vae_dtype))
        for encoder in texts.children():
            encoder(torch.zeros(batch, base_model.text_length, device="meta", dtype=torch.long))
        if image is not None:
            pixels = int(image.config.image_size)
            image(torch.zeros(batch, 3, pixels, pixels, device="meta", dtype=base_model.dtype))
    return meter


def _sampling_bytes(base_model: BaseModel, config: TrainConfig) -> int:
    """The most while the validation decodes its samples, with the models that a cache spares the steps."""
    if not config.validation_images or not config.sample_images or config.streams:
        return 0
    vae = base_model.meta_vae()
    nn.Module.to(vae, base_model.vae_dtype)
    rows = min(config.batch_size, config.sample_images, decode_rows(config.resolution**2))
    side = config.resolution // base_model.latent_scale
    latents = torch.zeros(rows, base_model.latent_channels, side, side, device="meta", dtype=base_model.vae_dtype)
    with torch.no_grad(), metered(vae.parameters()) as meter:
        vae.decode(latents)
    if config.cache is None:
        return meter.most_bytes
    loaded = [*vae.parameters()]
    if config.train_kind.takes_hidden_states:
        loaded += nn.Module.to(base_model.meta_image_encoder(), base_model.dtype).parameters()
    return meter.most_bytes + sum(p.nbytes for p in loaded)


def _forget_gradient(parameter: Tensor) -> None:
    """Gradients are counted with the optimizer."""
    parameter.grad = None


class Meter(TorchDispatchMode):
    """Follows the operations inside. `flops` are those of matrix products and convolutions, as PyTorch's own counter
    has them; `most_bytes` is the most that tensors made inside took at once. A storage counts once, those of `ignored`
    not at all.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.most_bytes = self._now = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        name = storage._cdata
        if name not in self._bytes:
            self._bytes[name] = storage.nbytes()
            weakref.finalize(storage, self._release, name)
            self._now += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self._now)

    def _release(self, name: int) -> None:
        self._now -= self._bytes.pop(name)


class _FusedAttention(torch.autograd.Function):
    """Shapes, saved tensors and work of a fused attention kernel, which never writes the attention matrix down."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: Meter) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        ctx.meter = meter
        meter.flops += _products(query, key, 2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        inputs = ctx.saved_tensors[:3]
        # One product for each gradient, one for that of the attention matrix; what a kernel computes again is not work.
        ctx.meter.flops += _products(*inputs[:2], sum(needed) + (needed[0] or needed[1]))
        return (*(torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, needed, strict=True)), None)


def _products(query: Tensor, key: Tensor, count: int) -> int:
    """FLOPs of matrix products of queries [B, heads, L, D] and keys [B, heads, S, D]."""
    return 2 * count * query.numel() * key.shape[-2]


@contextmanager
def metered(ignored: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """A `Meter` of what runs inside on the meta device. There PyTorch takes the attention apart; here it is counted as
    GPUs run it, fused.
    """
    meter = Meter(ignored)

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value, meter)

    with patch.object(F, "scaled_dot_product_attention", attend), meter:
        yield meter
