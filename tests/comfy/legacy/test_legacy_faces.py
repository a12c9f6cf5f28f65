"""The old FaceID nodes beside the old pack's, on insightface itself with small models, and their loaders."""

from __future__ import annotations

import pytest
import torch

UNNORMALISED = {
    "depth": 4,
    "resampler_width": 1280,
    "heads": 20,
    "dim_head": 64,
    "hidden_width": None,
    "unnormalised": True,
}
KINDS = {
    "faceid": ("faceid", "ip-adapter-faceid_sd15.safetensors", {"lora_rank": 8}),
    "plus v1": ("faceid-plus", "ip-adapter-faceid-plus_sd15.safetensors", {"lora_rank": 8}),
    "plus v2": ("faceid-plus", "ip-adapter-faceid-plusv2_sd15.safetensors", {"lora_rank": 8}),
    "portrait": ("portrait", "ip-adapter-faceid-portrait-v11_sd15.safetensors", {}),
}


@pytest.fixture(scope="module")
def face_pack(face_models, comfyui):
    """models/insightface/models/buffalo_l, where both packs look."""
    from pathlib import Path

    import folder_paths

    return face_models.write_pack(Path(folder_paths.models_dir) / "insightface" / "models" / "buffalo_l")


@pytest.fixture(scope="module")
def insightface(old, face_pack):
    return old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")[0]


@pytest.fixture(scope="module")
def faces(face_models):
    """Three images, the second with two faces."""
    drawn = [((16, 15, 12),), ((32, 6, 5), (16, 30, 25)), ((32, 9, 8),)]
    images = torch.stack([face_models.draw_faces(*places) for places in drawn])
    tint = torch.rand(3, 20, 20, 3, generator=torch.Generator().manual_seed(3)).repeat_interleave(32, 1)
    return (images * (0.6 + 0.4 * tint.repeat_interleave(32, 2))).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["IPAdapterFaceID", "IPAAdapterFaceIDBatch", "IPAdapterMS"])
def test_face_nodes(compare, changes, adapter_file, insightface, faces, name, kind):
    kind, file, options = KINDS[kind]
    made = adapter_file("sd15", kind, file, **options)
    for seed, image in ((0, faces[:1]), (1, faces)):
        given = {"image": image, "insightface": insightface, "file": made, "start_at": 0.0, "end_at": 1.0}
        changes([compare(name, "sd15", kind, seed, batch=1 + 2 * seed, **given)])


def test_portrait_of_raw_embeddings(compare, changes, adapter_file, insightface, faces):
    made = adapter_file("sdxl", "portrait", "ip-adapter-faceid-portrait_sdxl_unnorm.safetensors", changes=UNNORMALISED)
    given = {"image": faces[1:], "insightface": insightface, "file": made, "start_at": 0.0, "end_at": 1.0}
    changes([compare("IPAdapterFaceIDKolors", "sdxl", "portrait", 3, **given)])


def test_both_insightface_loaders_give_the_same_models(peer, old, face_pack, insightface, faces):
    theirs = peer.nodes["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")[0]
    assert type(insightface) is type(theirs)
    assert set(insightface.models) == {"detection", "recognition"}
    assert old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")[0] is insightface


def test_unified_loader_for_faces(peer, old, models, put, write_encoder, folders, face_pack):
    """The adapter, its encoder, its LoRA as weight patches of the model, and the face models."""
    from safetensors.torch import save_file

    put("sd15", "faceid-plus", "ip-adapter-faceid-plusv2_sd15", lora_rank=8)
    write_encoder("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    site = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q"
    width = models["sd15"].model.state_dict()[f"{site}.weight"].shape[0]
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_q"
    parts = {f"{name}.lora_up.weight": torch.ones(width, 2), f"{name}.lora_down.weight": torch.ones(2, width)}
    save_file(parts, folders / "loras" / "ip-adapter-faceid-plusv2_sd15_lora.safetensors")
    results = [
        nodes["IPAdapterUnifiedLoaderFaceID"]().load_models(models["sd15"], "FACEID PLUS V2", 0.6, "CPU")
        for nodes in (peer.nodes, old)
    ]
    (their_model, theirs), (our_model, ours) = results
    assert list(theirs) == list(ours) and ours["insightface"]["provider"] == "CPU"
    assert ours["ipadapter"]["file"] == theirs["ipadapter"]["file"]
    assert ours["ipadapter"]["model"]["faceidplusv2"] is True
    assert set(our_model.patches) == set(their_model.patches) and our_model.patches
    (folders / "loras" / "ip-adapter-faceid-plusv2_sd15_lora.safetensors").unlink()
    import folder_paths

    folder_paths.filename_list_cache.clear()
    # Without its own file, the LoRA inside the adapter's: of all attention layers, self-attention too.
    inside, _ = old["IPAdapterUnifiedLoaderFaceID"]().load_models(models["sd15"], "FACEID PLUS V2", 0.6, "CPU")
    assert len(inside.patches) == 4 * 32
    again, _ = old["IPAdapterUnifiedLoaderFaceID"]().load_models(models["sd15"], "FACEID PLUS V2", 0.0, "CPU")
    assert not again.patches


def test_faces_that_are_missing(pack, old, models, vision, adapter_file, insightface, faces):
    error = pack.core.AdapterError
    kind, file, options = KINDS["faceid"]
    (adapter,) = old["IPAdapterModelLoader"]().load_ipadapter_model(adapter_file("sd15", kind, file, **options))
    apply = old["IPAdapterFaceID"]().apply_ipadapter
    with pytest.raises(error, match="needs insightface"):
        apply(models["sd15"], adapter, image=faces)
    with pytest.raises(error, match="no face that was found"):
        apply(models["sd15"], adapter, image=torch.zeros(1, 300, 300, 3), insightface=insightface)
    with pytest.raises(error, match="which EMBEDS do not hold"):
        old["IPAdapterEmbeds"]().apply_ipadapter(models["sd15"], adapter, torch.zeros(1, 512), 1.0, "linear", 0.0, 1.0)
    # Without the image encoder too: this kind looks at the face alone.
    model, crops = apply(models["sd15"], adapter, image=faces, insightface=insightface)
    assert model is not models["sd15"] and crops.shape == (3, 224, 224, 3)
