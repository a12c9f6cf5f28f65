"""Properties of the attention term, the masks, the projectors and the layer tables."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ipadapter_core as ic
from ipadapter_core.attention import image_attention, scale_keys_values
from ipadapter_core.layers import attention_ids
from ipadapter_core.masks import level_grid
from ipadapter_core.projectors import FaceIDPlusProjection, FaceIDProjection, FullProjection, ImageProjection, Resampler
from ipadapter_core.weight_types import WEIGHT_LAYOUTS

fast = settings(max_examples=20, deadline=None, derandomize=True)
small = st.integers(1, 5)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = torch.einsum("bnhd,bthd->bhnt", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), v).flatten(2)


@fast
@given(
    batch=small,
    queries=small,
    tokens=small,
    heads=small,
    dim=small,
    shared=st.booleans(),
    weight=st.floats(-2, 3),
)
def test_image_attention(
    batch: int, queries: int, tokens: int, heads: int, dim: int, shared: bool, weight: float
) -> None:
    rows, width = (1 if shared else batch), heads * dim
    q = torch.randn(batch, queries, width)
    k, v = torch.randn(rows, tokens, width), torch.randn(rows, tokens, width)
    mask = torch.rand(1, queries, 1)
    expected = weight * mask * naive(q, k.expand(batch, -1, -1), v.expand(batch, -1, -1), heads)
    torch.testing.assert_close(
        image_attention(q, k, v, heads, weight=weight, mask=mask), expected, atol=1e-5, rtol=1e-5
    )
    per_row = torch.full((batch,), weight)
    torch.testing.assert_close(
        image_attention(q, k, v, heads, weight=per_row, mask=mask), expected, atol=1e-5, rtol=1e-5
    )


def test_several_images_equal_one_when_they_are_the_same() -> None:
    q, k, v = torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    one = image_attention(q, k, v, 2)
    three = image_attention(q, k.repeat(1, 3, 1), v.repeat(1, 3, 1), 2)
    torch.testing.assert_close(one, three, atol=1e-6, rtol=1e-6)


def test_keys_follow_the_querys_dtype() -> None:
    q, k = torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 2, 8)
    assert image_attention(q, k, k, 2, weight=torch.tensor([0.5]), mask=torch.ones(1, 4, 1)).dtype == torch.bfloat16


def test_another_attention_function_may_be_passed() -> None:
    calls: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(q.shape))
        return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k = torch.randn(3, 4, 8), torch.randn(1, 2, 8)
    assert torch.equal(image_attention(q, k, k, 2, attend=attend), image_attention(q, k, k, 2))
    assert calls == [(3, 2, 4, 4)]


def test_attention_refuses_what_does_not_fit() -> None:
    q, k = torch.randn(3, 4, 8), torch.randn(2, 2, 8)
    with pytest.raises(ic.AdapterError, match=r"2 rows of image keys for a batch of 3"):
        image_attention(q, k, k, 2)
    with pytest.raises(ic.AdapterError, match=r"8 wide with 3 heads"):
        image_attention(q, q, q, 3)
    with pytest.raises(ic.AdapterError, match=r"keys are \(3, 4, 5\)"):
        image_attention(q, q[..., :5], q[..., :5], 2)
    with pytest.raises(ic.AdapterError, match=r"keys are \(3, 4, 16\)"):
        image_attention(q, torch.cat([q, q], -1), torch.cat([q, q], -1), 2)
    with pytest.raises(ic.AdapterError, match=r"'V'.*V only"):
        scale_keys_values(ic.KeyValue(q, q), 1.0, "V")  # type: ignore[arg-type]


@fast
@given(
    batch=small,
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
)
def test_resize_mask(batch: int, height: int, width: int, h: int, w: int) -> None:
    mask = torch.rand(batch, height, width)
    out = ic.resize_mask(mask, (h, w))
    assert out.shape == (batch, h * w, 1)
    assert out.min() >= mask.min() - 1e-6 and out.max() <= mask.max() + 1e-6  # bilinear: no overshoot
    assert torch.equal(ic.resize_mask(mask[0], (h, w)), out[:1])
    assert torch.equal(ic.resize_mask(mask, (height, width)), mask.reshape(batch, -1, 1))


def test_resize_mask_keeps_rows_and_columns_apart() -> None:
    left = torch.zeros(6, 8)
    left[:, :4] = 1
    assert torch.equal(ic.resize_mask(left.bool(), (3, 4)).view(3, 4), torch.tensor([[1.0, 1, 0, 0]] * 3))
    for bad, grid in ((torch.zeros(1, 1, 2, 2), (2, 2)), (left, (0, 4))):
        with pytest.raises(ic.AdapterError):
            ic.resize_mask(bad, grid)


@fast
@given(height=st.integers(1, 200), width=st.integers(1, 200), level=st.integers(0, 3))
def test_level_grid(height: int, width: int, level: int) -> None:
    h, w = height, width
    for _ in range(level):
        h, w = -(-h // 2), -(-w // 2)
    found = level_grid((height, width), h * w)
    assert found == (h, w)


def test_level_grid_of_the_sizes_that_others_guess_wrong() -> None:
    assert level_grid((65, 64), 33 * 32) == (33, 32)  # 520 x 512 pixels; the guess is 32 x 33
    with pytest.raises(ic.AdapterError, match=r"1000 queries.*64x64"):
        level_grid((64, 64), 1000)


@fast
@given(batch=small, tokens=small, image=small, context=small, length=small, depth=st.integers(1, 2), heads=small)
def test_projector_shapes(
    batch: int, tokens: int, image: int, context: int, length: int, depth: int, heads: int
) -> None:
    states, embeds, face = torch.randn(batch, length, image), torch.randn(batch, image), torch.randn(batch, 3)
    plus = Resampler(image, context, tokens, dim=4 * heads, depth=depth, heads=heads, dim_head=4)
    face_plus = FaceIDPlusProjection(3, image, context, tokens, depth=depth, heads=heads, dim_head=4, shortcut=True)
    assert ImageProjection(image, context, tokens)(embeds).shape == (batch, tokens, context)
    assert FullProjection(image, context)(states).shape == (batch, length, context)
    assert plus(states).shape == (batch, tokens, context)
    assert FaceIDProjection(3, context, tokens)(face).shape == (batch, tokens, context)
    assert face_plus(face, states).shape == (batch, tokens, context)


# ---- layer tables


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_attention_ids(weight_keys: Any, family: str) -> None:
    names: list[str] = weight_keys[family]["attn_processor_names"]
    shuffled = random.Random(2).sample(names, len(names)) + ["down_blocks.0.motion_modules.0.attn2.processor"]
    ids = attention_ids(shuffled)
    assert ids == {name: index for index, name in enumerate(names)}
    cross_attention = [(id, name) for name, id in ids.items() if id % 2]
    assert cross_attention == [(i, n) for i, n in enumerate(names) if ".attn2." in n]


def test_attention_ids_refuses_other_models() -> None:
    with pytest.raises(ic.AdapterError, match=r"'transformer_blocks.0'.*UNets"):
        attention_ids(["transformer_blocks.0.attn2"])


def test_diffusers_sites(unet: Any, layout: str) -> None:
    sites = ic.diffusers_sites(unet)
    names = list(unet.attn_processors)
    assert [site.id for site in sites] == list(range(1, len(names), 2))
    assert [f"{site.name}.processor" for site in sites] == names[1::2]
    assert {site.cross_attention_dim for site in sites} == {24}
    assert ic.weight_layout(sites) == WEIGHT_LAYOUTS[layout]
    # InstantStyle's names: SDXL style is transformer 6, layout is transformer 3.
    if layout == "sdxl":
        indices = {site.name.split(".transformer_blocks")[0]: site.transformer_index for site in sites}
        assert indices["up_blocks.0.attentions.1"] == 6
        assert indices["down_blocks.2.attentions.1"] == 3
        assert indices["mid_block.attentions.0"] == 4


def test_a_model_without_cross_attention() -> None:
    with pytest.raises(ic.AdapterError, match=r"Linear has no cross-attention"):
        ic.diffusers_sites(nn.Linear(1, 1))
    with pytest.raises(ic.AdapterError, match=r"Linear is not a UNet"):
        ic.cross_attention_sites(nn.Linear(1, 1))


def test_stable_video_diffusion() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    with pytest.raises(ic.AdapterError, match=r"Stable Video Diffusion.*SD1\.5, SD2 and SDXL.*AnimateDiff"):
        ic.diffusers_sites(unet)


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = 8
        self.to_k = nn.Linear(context, width, bias=False, device="meta")


class Block(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)


class Transformer(nn.Module):
    def __init__(self, width: int, context: int, depth: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(width, context) for _ in range(depth))


class MotionModule(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.temporal_transformer = Transformer(width, width, 1)


def comfy_unet(blocks: dict[str, list[tuple[int, int]]], context: int) -> nn.Module:
    """The skeleton of ComfyUI's UNetModel: lists of sequential blocks, with a motion module in every one."""

    def sequential(width: int, depth: int) -> nn.Sequential:
        modules: list[nn.Module] = [nn.Identity()]
        if depth:
            modules.append(Transformer(width, context, depth))
        return nn.Sequential(*modules, MotionModule(8))

    unet = nn.Module()
    unet.input_blocks = nn.ModuleList(sequential(*b) for b in blocks["input"])
    unet.middle_block = sequential(*blocks["middle"][0])
    unet.output_blocks = nn.ModuleList(sequential(*b) for b in blocks["output"])
    return unet


COMFY: dict[str, dict[str, list[tuple[int, int]]]] = {
    "sd15": {
        "input": [
            *[(0, 0), (320, 1), (320, 1)],
            *[(0, 0), (640, 1), (640, 1)],
            *[(0, 0), (1280, 1), (1280, 1)],
            *[(0, 0)] * 3,
        ],
        "middle": [(1280, 1)],
        "output": [(0, 0)] * 3 + [(1280, 1)] * 3 + [(640, 1)] * 3 + [(320, 1)] * 3,
    },
    "sdxl": {
        "input": [(0, 0)] * 4 + [(640, 2), (640, 2), (0, 0), (1280, 10), (1280, 10)],
        "middle": [(1280, 10)],
        "output": [(1280, 10)] * 3 + [(640, 2)] * 3 + [(0, 0)] * 3,
    },
}


@pytest.mark.parametrize(("family", "context"), [("sd15", 768), ("sdxl", 2048)])
def test_comfy_sites(family: str, context: int) -> None:
    sites = ic.cross_attention_sites(comfy_unet(COMFY[family], context))
    assert ic.family_of(context, [site.dim for site in sites]) == family  # id order, middle last
    assert [site.id for site in sites] == list(range(1, 2 * len(sites), 2))
    assert sites[-1].block == ("middle", 0, 9 if family == "sdxl" else 0)
    assert sites[0].block == (("input", 4, 0) if family == "sdxl" else ("input", 1, 0))
    assert ic.weight_layout(sites) == WEIGHT_LAYOUTS[family]
    first = {site.transformer_index: site.block[:2] for site in sites if site.block}
    if family == "sdxl":  # InstantStyle's two blocks
        assert (first[6], first[3], first[4]) == (("output", 1), ("input", 8), ("middle", 0))
    else:
        assert (first[6], first[7]) == (("middle", 0), ("output", 3))


def test_weight_layout_of_something_else() -> None:
    with pytest.raises(ic.AdapterError, match=r"'x' is in none of input"):
        ic.weight_layout([ic.Site(1, "x", 8, 8, 0)])


# (transformers before, in and after the middle block, attention in each): pruned UNets as they are published.
PRUNED: dict[str, tuple[dict[str, list[tuple[int, int]]], tuple[int, int, int]]] = {
    "SSD-1B": (
        {
            "input": [(0, 0)] * 4 + [(640, 2), (640, 2), (0, 0), (1280, 4), (1280, 4)],
            "middle": [(0, 0)],
            "output": [(1280, 4), (1280, 4), (1280, 10), (640, 2), (640, 1), (640, 1)] + [(0, 0)] * 3,
        },
        (4, 0, 6),
    ),
    "BK-SDM base": (
        {
            "input": [(0, 0), (320, 1), (0, 0), (640, 1), (0, 0), (1280, 1), (0, 0), (0, 0)],
            "middle": [(1280, 1)],
            "output": [(0, 0)] * 2 + [(1280, 1)] * 2 + [(640, 1)] * 2 + [(320, 1)] * 2,
        },
        (3, 1, 6),
    ),
    "BK-SDM small": (
        {
            "input": [(0, 0), (320, 1), (0, 0), (640, 1), (0, 0), (1280, 1), (0, 0), (0, 0)],
            "middle": [],
            "output": [(0, 0)] * 2 + [(1280, 1)] * 2 + [(640, 1)] * 2 + [(320, 1)] * 2,
        },
        (3, 0, 6),
    ),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_unets(name: str) -> None:
    """Formulas over the layers hold for any UNet; what needs SD's own layers is refused with both numbers."""
    blocks, (before, middle, after) = PRUNED[name]
    unet = comfy_unet({**blocks, "middle": blocks["middle"] or [(0, 0)]}, 768)
    if not blocks["middle"]:
        unet.middle_block = None  # as in ComfyUI
    sites = ic.cross_attention_sites(unet)
    layout = ic.weight_layout(sites)
    assert (layout.inputs, layout.middle, layout.outputs) == (before, middle, after)
    count = before + middle + after

    def weights(weight_type: str) -> list[float]:
        return [layer.weight for layer in ic.layer_weights(weight_type, layout, 0.5)]

    assert weights("linear") == [0.5] * count
    assert weights("ease out") == pytest.approx([0.5 * (0.05 + 0.95 * i / count) for i in range(count)])
    assert weights("ease in-out") == pytest.approx([0.5 * (1 - 0.95 * abs(1 - 2 * i / count)) for i in range(count)])
    assert weights("weak input") == pytest.approx([0.1] * before + [0.5] * (middle + after))
    assert weights("weak output") == pytest.approx([0.5] * (before + middle) + [0.1] * after)
    if middle:
        assert weights("strong middle") == pytest.approx([0.1] * before + [0.5] + [0.1] * after)
    for weight_type in set(ic.WEIGHT_TYPES[9:]) | (set() if middle else {"weak middle", "strong middle"}):
        with pytest.raises(ic.AdapterError) as error:
            ic.layer_weights(weight_type, layout)
        for words in (repr(weight_type), f"this one has {before}, {middle} and {after}", "Use 'linear'"):
            assert words in str(error.value)


def test_a_count_alone_is_no_layout() -> None:
    """Eleven transformers as SDXL has, but elsewhere."""
    eleven = ic.WeightLayout(3, 0, 8)
    assert eleven.transformers == WEIGHT_LAYOUTS["sdxl"].transformers
    with pytest.raises(ic.AdapterError, match=r"4, 1 and 6 \(SDXL\).*3, 0 and 8"):
        ic.layer_weights("style transfer", eleven)
