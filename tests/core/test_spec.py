"""Every published variant is told from its tensor shapes, and metadata decides where shapes cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ipadapter_core as ic
from ipadapter_core.encoders import ImageEncoder, encoder_fits
from ipadapter_core.layers import ImageKeyValueLayers
from ipadapter_core.spec import KINDS

KEYS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden/weight_keys.json").read_text())
FAMILY = {"sd15": "sd15", "sd21": "sd2", "sdxl": "sdxl"}
# variant: kind, tokens, image width, face width, encoder
VARIANTS: dict[str, tuple[str, int, int | None, int | None, str]] = {
    "base_vith": ("base", 4, 1024, None, "CLIP ViT-H/14"),
    "base_bigG": ("base", 4, 1280, None, "OpenCLIP ViT-bigG/14"),
    "plus": ("plus", 16, 1280, None, "CLIP ViT-H/14"),
    "full": ("full", 257, 1280, None, "CLIP ViT-H/14"),
    "faceid": ("faceid", 4, None, 512, "InsightFace"),
    "faceid_portrait": ("portrait", 16, None, 512, "InsightFace"),
    "faceid_plus(v2)": ("faceid-plus", 4, 1280, 512, "CLIP ViT-H/14"),
}


def shapes_of(family: str, variant: str) -> dict[str, list[int]]:
    entry = KEYS[family][variant]
    return {f"{part}.{k}": s for part in ("image_proj", "ip_adapter") for k, s in entry[part].items()}


def open_shapes(shapes: dict[str, Any], **metadata: str) -> ic.AdapterCheckpoint:
    state = {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}
    names = {"base_family": ic.METADATA_BASE_FAMILY, "dim_head": ic.METADATA_DIM_HEAD}
    named = {names.get(k, f"ipadapter.{k}"): v for k, v in metadata.items()}
    return ic.checkpoint_from_state(state, path="adapter.safetensors", metadata=named)


def infer(shapes: dict[str, Any], **metadata: str) -> ic.AdapterSpec:
    return ic.infer_spec(open_shapes(shapes, **metadata))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("base", "image_dim"),
        ("faceid", "face_dim"),
        ("plus", "heads"),
        ("faceid-plus", "face_dim"),
        ("full", "image_dim"),
    ],
)
def test_a_spec_without_a_field_that_its_kind_needs_is_refused_by_name(kind: Any, field: str) -> None:
    spec = ic.new_spec(kind, (320,), 768)
    with pytest.raises(ic.AdapterError, match=f"spec of a {kind} adapter lacks {field}"):
        replace(spec, **{field: None})


def test_the_table_is_complete() -> None:
    assert all(set(variants) - {"attn_processor_names"} == set(VARIANTS) for variants in KEYS.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", KEYS)
def test_published_variant(family: str, variant: str) -> None:
    kind, tokens, image_dim, face_dim, encoder = VARIANTS[variant]
    checkpoint = open_shapes(shapes_of(family, variant))
    spec = ic.infer_spec(checkpoint)
    assert (spec.kind, spec.family, spec.num_tokens) == (kind, FAMILY[family], tokens)
    assert (spec.image_dim, spec.face_dim) == (image_dim, face_dim)
    assert encoder in spec.encoder
    assert spec.lora_rank == (128 if variant in ("faceid", "faceid_plus(v2)") else None)
    assert spec.layer_ids == tuple(range(1, 140 if family == "sdxl" else 32, 2))
    assert spec.layer_dims == ic.FAMILIES[spec.family][1]
    assert kind in str(spec) and ic.FAMILY_NAMES[spec.family] in str(spec)
    # The modules built from it have exactly the file's keys and shapes.
    adapter = ic.adapter_from_checkpoint(checkpoint)
    built = {key: list(tensor.shape) for key, tensor in ic.export_state(adapter).items()}
    assert built == shapes_of(family, variant)
    # And the spec that a trainer would start from is the same.
    new = ic.new_spec(spec.kind, spec.layer_dims, spec.cross_attention_dim, image_dim=spec.image_dim)
    assert new == spec


def resampler(width: int, image: int, context: int, *, depth: int, inner: int, tokens: int = 16) -> dict[str, Any]:
    spec = ic.new_spec("plus", [8, 16], context, image_dim=image, num_tokens=tokens, depth=depth, resampler_dim=width)
    spec = replace(spec, heads=inner // 64, dim_head=64)
    with torch.device("meta"):
        projector, layers = ic.build_projector(spec), ImageKeyValueLayers(spec)
    parts = {"image_proj": projector, "ip_adapter": layers}
    return {f"{p}.{k}": list(t.shape) for p, module in parts.items() for k, t in module.state_dict().items()}


@pytest.mark.parametrize(("depth", "inner"), [(1, 64), (4, 768), (7, 1280)])
def test_resamplers_of_any_depth_and_heads(depth: int, inner: int) -> None:
    spec = infer(resampler(128, 1280, 48, depth=depth, inner=inner, tokens=5))
    assert (spec.depth, spec.heads, spec.num_tokens, spec.resampler_dim) == (depth, inner // 64, 5, 128)
    assert spec.family == "context-48"


def test_kolors_plus() -> None:
    spec = infer(resampler(2048, 1024, 2048, depth=4, inner=768))
    assert (spec.heads, spec.resampler_dim, spec.encoder) == (12, 2048, "CLIP ViT-L/14 at 336 pixels")
    assert spec.is_kolors
    assert not infer(resampler(2048, 1280, 2048, depth=4, inner=1280)).is_kolors
    assert encoder_fits(spec, ImageEncoder(1024, 768, 577))
    assert not encoder_fits(spec, ImageEncoder(1024, 768, 257))


def test_resampler_over_a_face_embedding_is_portrait_unnormalised() -> None:
    shapes = resampler(1280, 512, 2048, depth=4, inner=1280)
    spec = infer(shapes)
    assert (spec.kind, spec.unnormalised, spec.feature) == ("portrait", True, "face_embeds")
    adapter = ic.adapter_from_checkpoint(open_shapes(shapes))
    assert adapter.encode(torch.empty(2, 512, device="meta")).shape == (2, 16, 2048)
    assert infer(shapes, kind="plus").feature == "penultimate_hidden_states"


def base(tokens: int, context: int = 768, widths: tuple[int, ...] = ic.FAMILIES["sd15"][1]) -> dict[str, Any]:
    shapes = {"proj.weight": [tokens * context, 1024], "proj.bias": [tokens * context]}
    shapes |= {"norm.weight": [context], "norm.bias": [context]}
    layers = {f"{2 * i + 1}.to_{p}_ip.weight": [w, context] for i, w in enumerate(widths) for p in "kv"}
    return {f"image_proj.{k}": s for k, s in shapes.items()} | {f"ip_adapter.{k}": s for k, s in layers.items()}


def test_sixteen_token_base_adapter() -> None:
    assert (infer(base(16)).kind, infer(base(16)).num_tokens) == ("base", 16)


def test_family_needs_the_widths_too() -> None:
    assert infer(base(4)).family == "sd15"
    assert infer(base(4, widths=(320,) * 16)).family == "context-768"


def test_faceid_without_lora_stays_faceid() -> None:
    shapes = {k: s for k, s in shapes_of("sd15", "faceid").items() if "lora" not in k}
    assert (infer(shapes).kind, infer(shapes).lora_rank) == ("faceid", None)
    assert infer(shapes_of("sd15", "faceid_portrait"), kind="faceid").kind == "faceid"


def test_shortcut_comes_from_metadata_only() -> None:
    shapes = shapes_of("sd15", "faceid_plus(v2)")
    assert infer(shapes).shortcut is None
    assert infer(shapes, shortcut="true").shortcut is True
    assert infer(shapes, shortcut="false").shortcut is False
    assert ic.shortcut_hint("models/ip-adapter-faceid-plusv2_sd15.bin") is True
    assert ic.shortcut_hint("ip-adapter-faceid-plus_sd15.bin") is False
    assert ic.shortcut_hint("plusv2-folder/mine.safetensors") is None


def test_metadata_names_the_encoder() -> None:
    spec = infer(base(4), encoder="me/my-clip", negative="black")
    assert (spec.encoder, spec.negative) == ("me/my-clip", "black")


def test_metadata_gives_the_head_width() -> None:
    shapes = resampler(64, 1280, 48, depth=1, inner=64)
    assert (infer(shapes, dim_head="16").heads, infer(shapes, dim_head="16").dim_head) == (4, 16)
    with pytest.raises(ic.AdapterError, match=r"64 wide.*heads of 48.*dim_head"):
        infer(shapes, dim_head="48")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "plus"}, "'plus'.*base"),
        ({"base_family": "sdxl"}, "'sdxl'.*'sd15'"),
        ({"tokens": "16"}, "16.*4 tokens"),
        ({"tokens": "many"}, "'many'"),
        ({"shortcut": "true"}, "'true'.*base"),
    ],
)
def test_contradicting_metadata(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ic.AdapterError, match=rf"adapter.safetensors.*{message}"):
        infer(base(4), **metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_spec_survives_the_header(kind: ic.Kind) -> None:
    spec = ic.new_spec(kind, [8, 16], 64, dim_head=16, depth=2, face_dim=32, lora_rank=2, encoder_id="x")
    spec = ic.with_shortcut(spec, True) if kind == "faceid-plus" else spec
    with torch.device("meta"):
        adapter = ic.IPAdapter(spec)
    checkpoint = ic.checkpoint_from_state(ic.export_state(adapter), metadata=ic.spec_metadata(spec))
    assert ic.infer_spec(checkpoint) == spec


def test_wrong_pairing_is_refused() -> None:
    sites = [ic.Site(2 * i + 1, "", w, 768, i) for i, w in enumerate(ic.FAMILIES["sd15"][1])]
    ic.check_compatible(infer(base(4)), sites)
    with pytest.raises(ic.AdapterError, match=r"x is made for SDXL \(context 2048.*is SD1.5 \(768.*SD1.5 adapter"):
        ic.check_compatible(infer(shapes_of("sdxl", "plus")), sites, "x")
