"""FLOPs and memory of a training step, counted on the meta device: no weight is read and nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ipadapter_core import AdapterApplication, AdapterSpec, IPAdapter, KeyValue, inject
from ipadapter_core.empty import without_weights

from ..models.base_model import BaseModel
from ..models.frozen import recompute_activations, release_conv_inputs
from ..models.generate import decode_rows
from ..settings.config import TrainConfig

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Of one training step on one device. A multiplication and an addition count as two FLOPs."""

    forward_flops: int
    flops: int  # forward and backward of the UNet and the adapter
    encoder_flops: int  # VAE, text and image encoders; 0 with a cache
    activation_bytes: int  # the peak besides weights, gradients and optimizer state
    trained_parameters: int
    frozen_parameters: Mapping[str, int]  # of the models that stay in memory, by name


@dataclass(frozen=True)
class Count:
    """FLOPs and bytes for one batch."""

    forward_flops: int
    flops: int
    peak_bytes: int


def step_cost(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Cost:
    """Count one batch of the settings."""
    cached = config.cache is not None
    adapter, unet = count_adapter(base_model, spec, config), count_unet(base_model, spec, config)
    encoders = Count(0, 0, 0) if cached else count_encoders(base_model, spec, config)
    frozen: dict[str, nn.Module] = {"UNet": base_model.meta_unet()}
    if not cached:
        frozen |= {"VAE": base_model.meta_vae(), "text": base_model.meta_text_encoders()}
        if spec.image_dim is not None:
            frozen["image"] = base_model.meta_image_encoder()
    step_bytes = max(adapter.peak_bytes + unet.peak_bytes, encoders.peak_bytes)
    return Cost(
        forward_flops=adapter.forward_flops + unet.forward_flops,
        flops=adapter.flops + unet.flops,
        encoder_flops=encoders.flops,
        activation_bytes=max(step_bytes, sampling_bytes(base_model, config)),
        trained_parameters=_parameters(_meta_adapter(spec)),
        frozen_parameters={name: _parameters(module) for name, module in frozen.items()},
    )


def _meta_adapter(spec: AdapterSpec) -> IPAdapter:
    with without_weights():
        return IPAdapter(spec)


def count_adapter(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Count:
    """The forward and backward pass of projector, keys and values."""
    batch, dtype = config.batch_size, train_dtype(config)
    adapter = _meta_adapter(spec).to(dtype)
    features = [] if spec.face_dim is None else [_zeros(batch, spec.face_dim, dtype=dtype)]
    if spec.image_dim is not None:
        tokens = () if spec.feature == "image_embeds" else (base_model.image_tokens,)
        features.append(_zeros(batch, *tokens, spec.image_dim, dtype=dtype))
    with metered(adapter.parameters()) as meter:
        outputs = [tensor for key_value in adapter(*features) for tensor in key_value]
        # The backward pass adds gradients of weights only, which count with the optimizer.
        forward_flops, peak_bytes = meter.flops, meter.peak_bytes
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    return Count(forward_flops, meter.flops, peak_bytes)


def count_unet(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Count:
    """The forward and backward pass of the frozen UNet, given image keys and values (and a LoRA)."""
    batch, dtype = config.batch_size, train_dtype(config)
    side = config.resolution // base_model.latent_scale
    unet: Any = nn.Module.to(base_model.meta_unet().requires_grad_(False), dtype)  # `unet.to` would warn
    if config.mixed_precision != "fp8" and not config.compile:
        release_conv_inputs(unet)  # as `prepare_unet` does
    if config.gradient_checkpointing:
        unet.train().enable_gradient_checkpointing()
    elif not config.compile:
        recompute_activations(unet)
    key_values = [
        KeyValue(*(_zeros(batch, spec.num_tokens, dim, dtype=dtype).requires_grad_() for _ in "kv"))
        for dim in spec.layer_dims
    ]
    lora = _meta_adapter(spec).to(dtype).lora
    weights = [*unet.parameters(), *(() if lora is None else lora.parameters())]
    for weight in weights:  # gradients count with the optimizer
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with (
        inject(unet, AdapterApplication(key_values, lora=lora, rows=range(batch))),
        metered(weights) as meter,
    ):
        predicted = unet(
            _zeros(batch, base_model.latent_channels, side, side, dtype=dtype),
            _zeros(batch),
            _zeros(batch, base_model.text_length, spec.cross_attention_dim, dtype=dtype),
            added_cond_kwargs=base_model.meta_conditions(batch),
        ).sample
        forward_flops = meter.flops
        predicted.float().mean().backward()
    return Count(forward_flops, meter.flops, meter.peak_bytes)


def count_encoders(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> Count:
    """The frozen encoders on images and captions."""
    batch, dtype, vae_dtype = config.batch_size, base_model.dtype, base_model.vae_dtype
    vae: Any = nn.Module.to(base_model.meta_vae(), vae_dtype)
    texts = nn.Module.to(base_model.meta_text_encoders(), dtype)
    image: Any = None if spec.image_dim is None else nn.Module.to(base_model.meta_image_encoder(), dtype)
    weights = [p for module in (vae, texts, image) if module is not None for p in module.parameters()]
    with torch.no_grad(), metered(weights) as meter:
        vae.encode(_zeros(batch, 3, config.resolution, config.resolution, dtype=vae_dtype))
        for encoder in texts.children():
            encoder(_zeros(batch, base_model.text_length, dtype=torch.long))
        if image is not None:
            side = int(image.config.image_size)
            image(_zeros(batch, 3, side, side, dtype=dtype))
    return Count(0, meter.flops, meter.peak_bytes)


def sampling_bytes(base_model: BaseModel, config: TrainConfig) -> int:
    """Peak memory while the validation decodes its samples, including the models that it loads again for that."""
    if not config.validation_images or not config.sample_images or config.streams:
        return 0
    vae: Any = nn.Module.to(base_model.meta_vae(), base_model.vae_dtype)
    side = config.resolution // base_model.latent_scale
    rows = min(config.batch_size, config.sample_images, decode_rows(config.resolution**2))
    with torch.no_grad(), metered(vae.parameters()) as meter:
        vae.decode(_zeros(rows, base_model.latent_channels, side, side, dtype=base_model.vae_dtype))
    loaded = [] if config.cache is None else list(vae.parameters())
    if config.cache is not None and config.train_kind.takes_hidden_states:
        loaded += nn.Module.to(base_model.meta_image_encoder(), base_model.dtype).parameters()
    return meter.peak_bytes + sum(p.nbytes for p in loaded)


def train_dtype(config: TrainConfig) -> torch.dtype:
    """What a training step computes in."""
    return torch.float32 if config.mixed_precision == "no" else torch.bfloat16


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=dtype)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Meter(TorchDispatchMode):
    """Counts FLOPs by the formulas of PyTorch's FlopCounterMode, and `peak_bytes`: the most that tensors made inside
    took at once, without the tensors `ignored`. FlopCounterMode itself would keep recomputed activations alive.

    On the meta device, an operation that has been seen with such arguments is not computed again: a UNet repeats the
    same few hundred, and PyTorch takes a third of a millisecond for each.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known: dict[Any, list[tuple[Any, ...] | None] | None] = {}  # results by operation and arguments
        self.flops = self.peak_bytes = self._bytes = 0
        self._seen = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._result(func, args, kwargs)
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                weakref.finalize(storage, self._release, storage.nbytes())
                self._bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._bytes)
        return result

    def _release(self, size: int) -> None:
        self._bytes -= size

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view:  # makes no new tensor
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        found = self._known.get(key)
        if found is not None:
            made = [new and torch.empty_strided(new[0], new[1], dtype=new[2], device="meta") for new in found]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _new_meta_tensors(result, tree_leaves((args, kwargs)))
        return result


def _described(value: Any) -> Any:
    """What an operation's result depends on: of a tensor its shape, strides, dtype and device."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True differ


def _new_meta_tensors(result: Any, arguments: Sequence[Any]) -> list[tuple[Any, ...] | None] | None:
    """Shape, strides and dtype of each tensor of a result, None for a gradient that was not asked for; None unless all
    are new and on the meta device.
    """
    results = [result] if isinstance(result, Tensor) else result
    if not isinstance(results, tuple | list) or not results:
        return None
    given = {tensor.untyped_storage() for tensor in arguments if isinstance(tensor, Tensor)}
    for tensor in results:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_meta or tensor.untyped_storage() in given:
            return None
    return [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in results]


def _attention_backward_flops(*args: Any, **kwargs: Any) -> int:
    """A matrix product for each gradient that is needed, and one for that of the attention matrix. PyTorch's formula
    also counts what the kernel computes a second time.
    """
    query, key, needed = args[1], args[2], args[10]
    return 2 * query.numel() * key.shape[-2] * (sum(needed[:3]) + (needed[0] or needed[1]))


_FORMULAS = {**flop_registry, aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops}


@contextmanager
def metered(ignored: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """A `Meter` of what runs inside on the meta device, where PyTorch would materialise attention matrices. GPUs run
    attention fused, and so it is counted.
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[0]

    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        with Meter(ignored) as meter:
            yield meter
    finally:
        F.scaled_dot_product_attention = attention
