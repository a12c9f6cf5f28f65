"""Measured inputs and outputs of the original implementation and of ComfyUI_IPAdapter_plus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import ipadapter_core as ic
from ipadapter_core.attention import image_attention, scale_keys_values

# Half precision: relative error of the whole tensor, because resampler layers amplify single roundings.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PLUS = "proj_faceid_plus_shortcut"
PROJECTORS = {
    "proj_base": ("base", ["image_embeds"]),
    "proj_full": ("full", ["image_embeds"]),
    "proj_plus": ("plus", ["image_embeds"]),
    "proj_faceid": ("faceid", ["id_embeds"]),
    f"{PLUS}0_scale1.0": ("faceid-plus", ["id_embeds", "clip_embeds"]),
    f"{PLUS}1_scale1.0": ("faceid-plus", ["id_embeds", "clip_embeds"]),
    f"{PLUS}1_scale0.6": ("faceid-plus", ["id_embeds", "clip_embeds"]),
}


def load_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    tensors = load_file(path)
    return tuple(  # type: ignore[return-value]
        {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("weights.", "input.", "output")
    )


def assert_matches(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    assert (found.float() - expected).norm() <= tolerance * expected.norm()
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def open_projector(weights: dict[str, Tensor]) -> tuple[ic.AdapterCheckpoint, ic.AdapterSpec]:
    norm = next(k for k in ("norm.weight", "norm_out.weight", "proj.3.weight") if k in weights)
    context = weights[norm].shape[0]
    state = {f"image_proj.{k}": v for k, v in weights.items()}
    layer = {f"ip_adapter.1.to_{part}_ip.weight": torch.ones(8, context) for part in "kv"}
    checkpoint = ic.checkpoint_from_state(state | layer)
    return checkpoint, ic.infer_spec(checkpoint)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", PROJECTORS)
def test_projector(golden: Path, name: str, dtype: torch.dtype) -> None:
    kind, inputs = PROJECTORS[name]
    weights, given, expected = load_golden(golden / f"{name}.safetensors")
    checkpoint, spec = open_projector(weights)
    assert spec.kind == kind
    shortcut = f"{PLUS}1" in name if kind == "faceid-plus" else None
    projector: Any = ic.adapter_from_checkpoint(checkpoint, dtype=dtype, shortcut=shortcut).projector
    if "scale0.6" in name:
        projector.shortcut_scale = 0.6
    with torch.no_grad():
        tokens = projector(*(given[key].to(dtype) for key in inputs))
    assert tokens.dtype == dtype
    assert_matches(tokens, expected[""])


def test_golden_resampler_shape(golden: Path) -> None:
    """Depth 3 and 2 heads, read from shapes alone."""
    _, spec = open_projector(load_golden(golden / "proj_plus.safetensors")[0])
    assert (spec.depth, spec.heads, spec.dim_head, spec.num_tokens, spec.image_dim) == (3, 2, 64, 16, 40)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_original_attention(golden: Path, dtype: torch.dtype) -> None:
    weights, given, expected = load_golden(golden / "attention_ip.safetensors")
    weights = {k: v.to(dtype) for k, v in weights.items()}
    hidden, context = given["hidden_states"].to(dtype), given["text_and_image_tokens"].to(dtype)
    query = hidden @ weights["to_q.weight"].T
    text, image = context[:, :-4], context[:, -4:]
    text_term = image_attention(query, text @ weights["to_k.weight"].T, text @ weights["to_v.weight"].T, 4)
    key, value = (image @ weights[f"processor.to_{part}_ip.weight"].T for part in "kv")
    out = text_term + image_attention(query, key, value, 4, weight=0.7)
    out = F.linear(out, weights["to_out.0.weight"], weights["to_out.0.bias"])
    assert_matches(out, expected[""])


def plus_attention(golden: Path) -> tuple[Tensor, ic.KeyValue, dict[str, Tensor], dict[str, Tensor]]:
    """Queries and keys in the batch order of the golden file: two unconditional rows, two conditional."""
    weights, given, expected = load_golden(golden / "ipadapter_plus_attention.safetensors")
    tokens = torch.cat([given["uncond_tokens"]] * 2 + [given["cond_tokens"]] * 2)
    pair = ic.KeyValue(tokens @ weights["to_k_ip"].T, tokens @ weights["to_v_ip"].T)
    return given["q"], pair, given, expected


@pytest.mark.parametrize("weight", [0.8, 1.5])
@pytest.mark.parametrize("scaling", ic.SCALINGS)
def test_scaling_modes(golden: Path, scaling: ic.Scaling, weight: float) -> None:
    query, pair, _, outputs = plus_attention(golden)
    expected = outputs[f".{scaling}.{weight}"]
    for given in (weight, torch.full((4,), weight)):
        scaled, left = scale_keys_values(pair, given, scaling)
        torch.testing.assert_close(image_attention(query, *scaled, 4, weight=left), expected, atol=1e-5, rtol=1e-5)


def test_soft_mask(golden: Path) -> None:
    query, pair, given, outputs = plus_attention(golden)
    mask = ic.resize_mask(given["mask"], (5, 6))
    out = image_attention(query, *pair, 4, mask=mask)
    torch.testing.assert_close(out, outputs[".masked.V only.1.0"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_weight_types(golden: Path, family: str) -> None:
    table: dict[str, list[list[float]]] = json.loads((golden / "weight_types.json").read_text())[family]
    assert sorted(table) == sorted(ic.WEIGHT_TYPES)
    for weight_type, rows in table.items():
        weights = ic.layer_weights(weight_type, family, 1.0, weight_composition=0.5, boost=0.75)
        # Positive tokens read 1 and negative tokens 3.
        found = [[w.positive, 3 * w.negative + w.positive_into_negative] for w in weights]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(rows), atol=2e-6, rtol=0, msg=weight_type)


def test_weight_types_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ic.AdapterError, match=r"'swirl'.*linear"):
        ic.layer_weights("swirl", "sd15")
    with pytest.raises(ic.AdapterError, match=r"'context-24'"):
        ic.layer_weights("linear", "context-24")


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("original", "linear"),
        ("standard", "linear"),
        ("prompt is more important", "ease out"),
        ("style transfer (SDXL)", "style transfer"),
        ("style transfer (SDXL only)", "style transfer"),
        ("composition (SDXL)", "composition"),
        ("style transfer and composition", "style and composition"),
    ],
)
def test_former_names_of_weight_types(name: str, now: str) -> None:
    assert ic.layer_weights(name, "sdxl", 0.6) == ic.layer_weights(now, "sdxl", 0.6)
    assert name not in ic.WEIGHT_TYPES


def test_the_former_channel_penalty() -> None:
    with pytest.raises(ic.AdapterError, match=r"'channel penalty' is now 'linear' with .*'K\+mean\(V\) w/ C penalty'"):
        ic.layer_weights("channel penalty", "sd15")


def test_boost_defaults_to_the_weight() -> None:
    for weight_type in ("style transfer precise", "composition precise"):
        assert ic.layer_weights(weight_type, "sdxl", 0.6) == ic.layer_weights(weight_type, "sdxl", 0.6, boost=0.6)
