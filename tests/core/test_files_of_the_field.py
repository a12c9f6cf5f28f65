"""The adapter and encoder files that people really load: told apart by their tensors, and named for what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ipadapter_core as ic
from ipadapter_core.encoders import ImageEncoder, encoder_fits, encoder_from_shapes, find_encoder
from ipadapter_core.layers import ImageKeyValueLayers

WIDTHS = (8, 8, 16)


def adapter_state(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return ic.export_state(ic.IPAdapter(ic.new_spec("base", WIDTHS, 24, image_dim=12, **options)))


def under(state: dict[str, Tensor], image_proj: str, ip_adapter: str) -> dict[str, Tensor]:
    names = {"image_proj.": image_proj, "ip_adapter.": ip_adapter}
    return {names[key[: key.index(".") + 1]] + key[key.index(".") + 1 :]: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("first", ["published", "trainer"])
def test_the_published_copy_wins_wherever_it_is(first: str) -> None:
    """NoobAI's MARK1 holds both; here they differ, so that it shows which one was read."""
    published, other = adapter_state(1), under(adapter_state(2), "image_proj_model.", "adapter_modules.")
    both = {**published, **other} if first == "published" else {**other, **published}
    checkpoint = ic.checkpoint_from_state(both)
    assert checkpoint.layout == "flat"
    loaded = ic.export_state(ic.adapter_from_checkpoint(checkpoint))
    assert loaded.keys() == published.keys()
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, published[key])
    alone = ic.export_state(ic.adapter_from_checkpoint(ic.checkpoint_from_state(other)))
    assert not torch.equal(alone["image_proj.proj.weight"], published["image_proj.proj.weight"])


def kv(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2, 2) for name in names}


FOREIGN = {
    "StyleShot": kv("style_image_proj_modules.0.proj.weight", "adapter_modules.1.to_k_ip.weight"),
    "CSGO": kv("content_image_proj.latents", "style_image_proj.latents", "ip_adapter.1.to_k_ip_content.weight"),
    "IPAdapter-Instruct": {**adapter_state(), **kv("image_proj.proj_new_input.weight")},
    "PuLID": kv("id_adapter_attn_layers.0.to_q.weight"),
    "XLabs IP-Adapter for FLUX": kv("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
    "IP-Adapter for FLUX": kv("image_proj.proj.0.weight", "ip_adapter.0.to_k_ip.weight", "ip_adapter.1.to_k_ip.weight"),
    "IP-Adapter for SD3.5": kv(
        "image_proj.latents", "ip_adapter.0.norm_ip.linear.weight", "ip_adapter.0.to_k_ip.weight"
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_adapter_for_something_else(tmp_path: Path, name: str) -> None:
    save_file(FOREIGN[name], tmp_path / "x.safetensors")
    for read in (ic.load_adapter, ic.read_checkpoint):
        with pytest.raises(ic.AdapterError, match=rf"x\.safetensors: an? .*{name}.*not an IP-Adapter for.*[Uu]se "):
            read(tmp_path / "x.safetensors")
    assert name in ic.looks_like(FOREIGN[name])


def test_inspecting_and_loading_agree() -> None:
    """A tensor too many is found from the header already."""
    checkpoint = ic.checkpoint_from_state({**adapter_state(), **kv("image_proj.more.weight")})
    for read in (ic.infer_spec, ic.adapter_from_checkpoint):
        with pytest.raises(ic.AdapterError, match=r"1 unexpected tensors, the first is more\.weight"):
            read(checkpoint)


def test_instantid_is_named_beside_the_portrait_adapter() -> None:
    context, widths = ic.FAMILIES["sdxl"]
    spec = ic.new_spec("plus", widths, context, image_dim=512)
    spec = replace(spec, kind="portrait", image_dim=None, face_dim=512, unnormalised=True)
    assert "InstantID" in spec.lookalike and "InstantID" in spec.describe()
    assert ic.new_spec("portrait", widths, context).lookalike == ""


def kolors_face(**metadata: str) -> ic.AdapterSpec:
    """The shapes of Kolors' FaceID: tokens of 4096 for layers that take 2048, on a narrow UNet."""
    spec = ic.new_spec("faceid-plus", WIDTHS, 2048, image_dim=1024, num_tokens=6, lora_rank=None)
    spec = replace(spec, token_dim=4096, resampler_dim=4096, heads=64)
    with torch.device("meta"):
        parts = {"image_proj": ic.build_projector(spec), "ip_adapter": ImageKeyValueLayers(spec)}
    state = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}
    return ic.infer_spec(ic.checkpoint_from_state(state, metadata=metadata))


def test_kolors_faceid() -> None:
    spec = kolors_face()
    assert (spec.kind, spec.num_tokens, spec.token_dim, spec.cross_attention_dim) == ("faceid-plus", 6, 4096, 2048)
    assert spec.is_kolors and spec.unnormalised and spec.shortcut and spec.family_name == "Kolors"
    assert kolors_face(**{ic.METADATA_SHORTCUT: "false"}).shortcut is False
    assert encoder_fits(spec, ImageEncoder(1024, 768, 577, layers=24))
    assert not encoder_fits(spec, ImageEncoder(1024, 768, 257, layers=24))


class Unet(nn.Module):
    """The two places that tell Kolors from SDXL, as ComfyUI names them."""

    def __init__(self, label: int, projection: bool) -> None:
        super().__init__()
        self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(label, 4)))
        if projection:
            self.encoder_hid_proj = nn.Linear(4096, 8)


@pytest.mark.parametrize(
    ("label", "projection", "kolors"), [(2816, False, False), (2816, True, True), (5632, False, True)]
)
def test_kolors_and_sdxl_do_not_mix(label: int, projection: bool, kolors: bool) -> None:
    unet = Unet(label, projection)
    assert ic.is_kolors_unet(unet) is kolors
    sites = [ic.Site(2 * i + 1, str(i), width, 2048, i) for i, width in enumerate(WIDTHS)]
    made_for = {True: kolors_face(), False: ic.new_spec("base", WIDTHS, 2048)}
    ic.check_compatible(made_for[kolors], sites, "x", unet=unet)
    with pytest.raises(ic.AdapterError, match="the connected model is Kolors" if kolors else "x is made for Kolors"):
        ic.check_compatible(made_for[not kolors], sites, "x", unet=unet)


def test_the_tokens_of_kolors_faceid_pass_the_models_own_projection() -> None:
    unet, tokens = Unet(2816, projection=True), torch.randn(2, 6, 4096)
    narrowed = ic.context_tokens(tokens, kolors_face(), unet)
    torch.testing.assert_close(narrowed, unet.encoder_hid_proj(tokens))
    assert ic.context_tokens(tokens, ic.new_spec("base", WIDTHS, 2048), unet) is tokens
    with pytest.raises(ic.AdapterError, match=r"k\.bin needs the encoder_hid_proj"):
        ic.context_tokens(tokens, kolors_face(), Unet(5632, projection=False), "k.bin")


def test_kolors_in_diffusers() -> None:
    class Diffusers(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.encoder_hid_proj = None  # of every diffusers UNet
            self.add_embedding = nn.ModuleDict({"linear_1": nn.Linear(width, 4)})

    assert ic.is_kolors_unet(Diffusers(5632)) and not ic.is_kolors_unet(Diffusers(2816))
    assert not ic.is_kolors_unet(nn.Linear(2, 2))


V = "vision_model.embeddings."


def clip(width: int, tokens: int, layers: int, embeds: int | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{V}class_embedding": (width,),
        f"{V}position_embedding.weight": (tokens, width),
        f"{V}patch_embedding.weight": (width, 3, 14, 14),
        f"vision_model.encoder.layers.{layers - 1}.layer_norm1.weight": (width,),
    }
    return shapes if embeds is None else {**shapes, "visual_projection.weight": (embeds, width)}


def siglip(tokens: int, patch: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"{V}position_embedding.weight": (tokens, 1152),
        f"{V}patch_embedding.weight": (1152, *patch),
        "vision_model.encoder.layers.26.layer_norm1.weight": (1152,),
    }


def dino2(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1370, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "encoder.layer.0.layer_scale1.lambda1": (width,),
        f"encoder.layer.{layers - 1}.layer_scale2.lambda1": (width,),
    }


def dino3(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.register_tokens": (1, 4, width),
        "embeddings.patch_embeddings.weight": (width, 3, 16, 16),
        "layer.0.attention.o_proj.bias": (width,),
        f"layer.{layers - 1}.norm1.weight": (width,),
    }


# name: shapes, what they are
ENCODERS: dict[str, tuple[dict[str, tuple[int, ...]], ImageEncoder]] = {
    "CLIP ViT-L/14": (clip(1024, 257, 24, 768), ImageEncoder(1024, 768, 257, "CLIP", 24, 14)),
    "CLIP ViT-L/14 at 336 pixels": (clip(1024, 577, 24, 768), ImageEncoder(1024, 768, 577, "CLIP", 24, 14)),
    "CLIP ViT-H/14": (clip(1280, 257, 32, 1024), ImageEncoder(1280, 1024, 257, "CLIP", 32, 14)),
    "OpenCLIP ViT-bigG/14": (clip(1664, 257, 48, 1280), ImageEncoder(1664, 1280, 257, "CLIP", 48, 14)),
    "SigLIP so400m": (siglip(729, (3, 14, 14)), ImageEncoder(1152, None, 729, "SigLIP", 27, 14)),
    "SigLIP at 512": (siglip(1024, (3, 16, 16)), ImageEncoder(1152, None, 1024, "SigLIP", 27, 16)),
    "SigLIP2 so400m NaFlex": (siglip(256, (768,)), ImageEncoder(1152, None, 256, "SigLIP2", 27, 16)),
    "DINOv2-L": (dino2(1024, 24), ImageEncoder(1024, 1024, 1370, "DINOv2", 24, 14)),
    "DINOv2-g": (dino2(1536, 40), ImageEncoder(1536, 1536, 1370, "DINOv2", 40, 14)),
    "DINOv3-L": (dino3(1024, 24), ImageEncoder(1024, 1024, None, "DINOv3", 24, 16)),
    "DINOv3-H+": (dino3(1280, 32), ImageEncoder(1280, 1280, None, "DINOv3", 32, 16)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_told_apart(name: str) -> None:
    shapes, expected = ENCODERS[name]
    found = encoder_from_shapes(shapes)
    assert found == expected
    assert found.describe().startswith("SigLIP so400m" if name == "SigLIP at 512" else name)


def spec_for(kind: str, width: int, encoder_id: str | None = None) -> ic.AdapterSpec:
    context, widths = ic.FAMILIES["sd15"]
    return ic.new_spec(kind, widths, context, image_dim=width, encoder_id=encoder_id)


# What an adapter takes (kind, width, what its metadata says), and the encoders that are its.
FITS: list[tuple[str, int, str | None, set[str]]] = [
    ("base", 1024, None, {"CLIP ViT-H/14"}),
    ("base", 1280, None, {"OpenCLIP ViT-bigG/14"}),
    ("base", 768, None, {"CLIP ViT-L/14"}),
    ("base", 1024, "facebook/dinov2-large", {"DINOv2-L"}),
    ("plus", 1280, None, {"CLIP ViT-H/14"}),
    ("plus", 1280, "facebook/dinov3-vith16plus", {"DINOv3-H+"}),
    ("plus", 1664, None, {"OpenCLIP ViT-bigG/14"}),
    ("plus", 1024, None, {"CLIP ViT-L/14"}),
    ("plus", 1024, "DINOv2-L", {"DINOv2-L"}),
    ("plus", 1152, None, {"SigLIP so400m", "SigLIP at 512", "SigLIP2 so400m NaFlex"}),
    ("plus", 1152, "google/siglip2-so400m-patch16-naflex", {"SigLIP so400m", "SigLIP at 512", "SigLIP2 so400m NaFlex"}),
    ("plus", 1152, "google/siglip-so400m-patch14-384", {"SigLIP so400m", "SigLIP at 512"}),
    ("plus", 1536, None, {"DINOv2-g"}),
    ("full", 1280, None, {"CLIP ViT-H/14"}),
    ("base", 1152, None, set()),  # SigLIP's pooling head is what no ComfyUI loads
]


@pytest.mark.parametrize(("kind", "width", "encoder_id", "expected"), FITS)
def test_which_encoders_an_adapter_takes(kind: str, width: int, encoder_id: str | None, expected: set[str]) -> None:
    spec = spec_for(kind, width, encoder_id)
    assert {name for name, (_, encoder) in ENCODERS.items() if encoder_fits(spec, encoder)} == expected


def test_a_plus_adapter_of_1024_names_both_of_its_encoders() -> None:
    assert spec_for("plus", 1024).encoder == "CLIP ViT-L/14 or DINOv2-L"
    assert "SigLIP so400m" in spec_for("plus", 1152).encoder
    assert "pooling head, which ComfyUI does not load" in spec_for("base", 1152).encoder
    assert spec_for("base", 999).encoder == "an unknown image encoder of width 999"


def test_two_encoders_that_fit_and_differ_are_a_question(tmp_path: Path) -> None:
    files = {}
    for name in ("SigLIP so400m", "SigLIP at 512"):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({key: torch.zeros(shape) for key, shape in ENCODERS[name][0].items()}, files[name])
    assert find_encoder(spec_for("plus", 1152), [files["SigLIP at 512"]]) == files["SigLIP at 512"]
    with pytest.raises(ic.AdapterError, match=r"several image encoders.*729 tokens.*1024 tokens.*clip_vision_name"):
        find_encoder(spec_for("plus", 1152), files.values())
    with pytest.raises(ic.AdapterError, match=r"sigclip_vision_384"):
        find_encoder(spec_for("plus", 1152), [])


def test_a_full_adapter_at_another_resolution() -> None:
    """One token for each patch: the encoder's file has 257, at 448 pixels it makes 1025."""
    spec = replace(spec_for("full", 1280), num_tokens=1025, encoder_resolution=448)
    assert encoder_fits(spec, ENCODERS["CLIP ViT-H/14"][1])
    assert not encoder_fits(replace(spec, encoder_resolution=None), ENCODERS["CLIP ViT-H/14"][1])
    state = ic.export_state(ic.IPAdapter(ic.new_spec("base", WIDTHS, 24, image_dim=12)))
    for text, expected in (("448", 448), (None, None)):
        metadata = {} if text is None else {ic.METADATA_RESOLUTION: text}
        spec = ic.infer_spec(ic.checkpoint_from_state(state, metadata=metadata))
        assert spec.encoder_resolution == expected
        assert ic.spec_metadata(spec).get(ic.METADATA_RESOLUTION) == text
