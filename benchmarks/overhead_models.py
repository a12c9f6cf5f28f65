"""Random UNets and adapters, and how each pack's Apply is called with them. Import it after `start_comfyui`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor, nn

REAL_WIDTH = 320  # channels of the first level of SD1.5 and SDXL
IMAGE_TOKENS, IMAGE_WIDTH = 257, 1280  # the penultimate hidden states of ViT-H/14
TOKENS, RESAMPLER_WIDTH = 16, {"sd15": 768, "sdxl": 1280}  # of the published plus adapters
CONTEXT = {"sd15": 768, "sdxl": 2048}  # the peer tells the families apart by these, so they stay real
TEXT_TOKENS = 77

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_SHAPES = {
    "sd15": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2] * 4,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}
_HEADS = {
    "sd15": {"num_heads": 8, "num_head_channels": -1},
    "sdxl": {"num_heads": -1, "num_head_channels": 64},
}


def new_unet(
    family: str, width: int, dtype: torch.dtype = torch.float32, *, meta: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A UNet with the layers of SD1.5 or SDXL, `width` channels in its first level, as a MODEL.

    A `meta` one has shapes but no weights: enough to apply an adapter to, not to sample from.
    """
    config = {**_COMMON, **_SHAPES[family], "model_channels": width, "context_dim": CONTEXT[family]}
    supported = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](config)
    supported.unet_config.update(_HEADS[family])
    supported.set_inference_dtype(dtype, None)
    base = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[family]
    cpu = torch.device("cpu")
    model = base(supported, model_type=comfy.model_base.ModelType.EPS, device=torch.device("meta") if meta else cpu)
    if not meta:
        randomise(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1: ComfyUI's modules start uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        else:  # norms and biases
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A random plus adapter of 16 tokens, and the features of a picture and of the negative branch, [1, 257, 1280]."""

    module: Any
    positive: Tensor
    negative: Tensor


def new_adapter(pack: SimpleNamespace, model: Any, family: str, dtype: torch.dtype) -> Adapter:
    """An adapter with weights of `dtype` that fits the model."""
    sites = pack.core.cross_attention_sites(model.get_model_object("diffusion_model"))
    spec = pack.core.new_spec(
        "plus",
        [site.width for site in sites],
        sites[0].context_width,
        image_width=IMAGE_WIDTH,
        tokens=TOKENS,
        resampler_width=RESAMPLER_WIDTH[family],
    )
    module = pack.core.init_adapter(spec, operations=comfy.ops.manual_cast, dtype=dtype).eval()
    randomise(module)
    features = torch.randn(2, 1, IMAGE_TOKENS, IMAGE_WIDTH, generator=torch.Generator().manual_seed(1))
    return Adapter(module, features[0], features[1])


class Ours:
    """Apply IP Adapter of this repository, with an image prompt that is already encoded."""

    def __init__(self, pack: SimpleNamespace, adapter: Adapter) -> None:
        self.pack, self.adapter = pack, adapter
        self.loaded = pack.types.manage("benchmark.safetensors", adapter.module)
        encoded = [pack.types.EncodedImages(features) for features in (adapter.positive, adapter.negative)]
        self.prompt = pack.types.ImagePrompt(*encoded, self.loaded.name)
        pack.types.project(self.loaded, self.prompt)

    def apply(self, model: Any, end_at: float = 1.0) -> Any:
        """The patched MODEL."""
        return self.pack.ApplyIPAdapter.execute(model, self.loaded, self.prompt, end_at=end_at).args[0]

    def apply_with_projection(self, model: Any) -> Any:
        """The patched MODEL, with all the work that the peer's Apply does."""
        prompt = dataclasses.replace(self.prompt)
        return self.pack.ApplyIPAdapter.execute(model, self.loaded, prompt).args[0]


class OldNames:
    """This repository's IPAdapterEmbeds, the old pack's node under its own name: like the peer's, it runs the image
    projector in every execution, and leaves out the middle block.
    """

    def __init__(self, pack: SimpleNamespace, adapter: Adapter) -> None:
        self.node = pack.IPAdapterEmbeds()
        self.adapter = adapter
        self.file = pack.wires.AdapterFile(pack.types.manage("benchmark.safetensors", adapter.module))

    def apply(self, model: Any, end_at: float = 1.0) -> Any:
        """The patched MODEL."""
        options = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": end_at}
        adapter = self.adapter
        return self.node.apply_ipadapter(model, self.file, adapter.positive, neg_embed=adapter.negative, **options)[0]

    apply_with_projection = apply


class Peer:
    """The peer's node for features that are already encoded; it runs the projector itself, in every execution."""

    def __init__(self, package: ModuleType, pack: SimpleNamespace, adapter: Adapter) -> None:
        self.node = package.NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]()
        self.adapter = adapter
        # What its loader makes of a file: the same tensors as ours, no copies.
        self.file: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in pack.core.export_state(adapter.module).items():
            part, _, name = key.partition(".")
            self.file[part][name] = tensor

    def apply(self, model: Any, end_at: float = 1.0) -> Any:
        """The patched MODEL."""
        options = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": end_at}
        adapter = self.adapter
        return self.node.apply_ipadapter(model, self.file, adapter.positive, neg_embed=adapter.negative, **options)[0]


@contextlib.contextmanager
def half_precision_unets() -> Iterator[None]:
    """As if ComfyUI had been started with --fp16-unet: the peer takes its dtype from there, not from the model."""
    before = comfy.cli_args.args.fp16_unet
    comfy.cli_args.args.fp16_unet = True
    try:
        yield
    finally:
        comfy.cli_args.args.fp16_unet = before


def sample(model: Any, family: str, steps: int, size: int, callback: Any = None) -> Tensor:
    """Latents [1, 4, size, size] of ComfyUI's KSampler with classifier-free guidance, always from the same noise."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, 1, TEXT_TOKENS, CONTEXT[family], generator=generator)
    positive, negative = ([[states, {"pooled_output": torch.zeros(1, 1280)}]] for states in text)
    latent = torch.zeros(1, 4, size, size)
    noise = torch.randn(latent.shape, generator=generator)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        4.0,
        "euler",
        "normal",
        positive,
        negative,
        latent,
        callback=callback,
        disable_pbar=True,
        seed=3,
    )
