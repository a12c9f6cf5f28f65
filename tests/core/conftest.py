"""Tiny but real parts: diffusers UNets in the shapes of SD1.5 and SDXL, and adapters for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)

import ipadapter_core as ic  # noqa: E402

CONTEXT = 24
IMAGE = 20
LAYOUTS = ("sd15", "sdxl")
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": (8, 16, 24, 24),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 2,
    },
    "sdxl": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
    },
    "small": {  # as SD1.5, with one layer in place of each two or three: to be compiled in seconds
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
}


def make_unet(layout: str, seed: int = 0) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    shared = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": CONTEXT}
    return UNet2DConditionModel(**(shared | UNETS[layout])).eval()


def make_adapter(unet: Any, kind: str = "base", seed: int = 1, **spec: Any) -> ic.IPAdapter:
    """An adapter for a UNet with strong random weights that differ in every layer."""
    torch.manual_seed(seed)
    sites = ic.diffusers_sites(unet)
    options: dict[str, Any] = {"image_dim": IMAGE, "face_dim": 12, "resampler_dim": 64, "lora_rank": 3}
    if kind == "faceid-plus":
        options["dim_head"] = 8
    widths = [site.dim for site in sites]
    adapter = ic.IPAdapter(ic.new_spec(kind, widths, sites[0].cross_attention_dim, **(options | spec)))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return adapter.requires_grad_(False)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def weight_keys() -> Any:
    return json.loads((GOLDEN / "weight_keys.json").read_text())


@pytest.fixture(scope="session")
def unets() -> dict[str, Any]:
    """Shared UNets; tests must leave them as they were (which is what they test)."""
    return {layout: make_unet(layout).requires_grad_(False) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def unet(unets: dict[str, Any], layout: str) -> Any:
    return unets[layout]


@pytest.fixture
def new_unet() -> Any:
    return make_unet


@pytest.fixture
def new_adapter() -> Any:
    return make_adapter


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randn(2, 7, CONTEXT, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def features() -> Any:
    """Random features of an adapter's kind, for a batch."""

    def make(adapter: ic.IPAdapter, batch: int = 2, seed: int = 5) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "image_embeds": [(batch, IMAGE)],
            "penultimate_hidden_states": [(batch, 9, IMAGE)],
            "face_embeds": [(batch, 12)],
            "face_embeds+penultimate_hidden_states": [(batch, 12), (batch, 9, IMAGE)],
        }[adapter.spec.feature]
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return make
