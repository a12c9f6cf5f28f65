"""The old FaceID nodes beside the old pack's, on insightface itself with small models, and their loaders."""

from __future__ import annotations

import shutil
import socket

import numpy as np
import pytest
import torch

UNNORMALISED = {
    "depth": 4,
    "resampler_dim": 1280,
    "heads": 20,
    "dim_head": 64,
    "hidden_dim": None,
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
    """For other packs too, which call insightface's own methods on it."""
    theirs = peer.nodes["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")[0]
    assert type(insightface) is type(theirs)
    assert set(insightface.models) == {"detection", "recognition"}
    assert old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")[0] is insightface
    pixels = (faces[1].flip(-1) * 255).byte().numpy()
    ours, expected = insightface.get(pixels), theirs.get(pixels)
    assert len(ours) == len(expected) == 2
    for mine, other in zip(ours, expected, strict=True):
        for name in ("bbox", "kps", "det_score", "embedding", "normed_embedding"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))


@pytest.fixture
def own_folder(pack, tmp_path, monkeypatch):
    """models/insightface/models/buffalo_l of one test, without network."""
    import folder_paths

    def refuse(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(tmp_path)], set()))
    pack.loader_nodes._loaded.clear()  # of other tests' folders
    yield tmp_path / "models" / "buffalo_l"
    pack.loader_nodes._loaded.clear()


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "no folder": (shutil.rmtree, "No face models in .*buffalo_l. Put det_10g.onnx and w600k"),
    "no file": (lambda folder: [f.unlink() for f in folder.iterdir()], "No face models in .*buffalo_l. Put det_10g"),
    "no detector": (
        lambda folder: (folder / "det_10g.onnx").unlink(),
        "buffalo_l holds no detection model: .* Put det",
    ),
    "no recogniser": (
        lambda folder: (folder / "w600k_r50.onnx").unlink(),
        "buffalo_l holds no recognition model: .* Put",
    ),
    "cut": (
        lambda folder: _cut(folder / "w600k_r50.onnx"),
        "w600k_r50.onnx: onnxruntime cannot load it .* download it",
    ),
    "cut detector": (
        lambda folder: _cut(folder / "det_10g.onnx"),
        "det_10g.onnx: onnxruntime cannot load it .* download",
    ),
    "pointer": (
        lambda folder: (folder / "w600k_r50.onnx").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "w600k_r50.onnx: a Git LFS pointer, not the file itself; expected an ONNX model. Download it again",
    ),
    "another model": (
        lambda folder: (folder / "2d106det.onnx").replace(folder / "w600k_r50.onnx"),
        "buffalo_l holds no recognition model: det_10g.onnx, w600k_r50.onnx. Put",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_face_models_that_cannot_be_used(pack, old, face_models, models, put, own_folder, case):
    """Of both old loaders: a sentence, and no download."""
    spoil, message = BROKEN[case]
    face_models.write_pack(own_folder)
    spoil(own_folder)
    with pytest.raises(pack.core.AdapterError, match=message):
        old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")
    put("sd15", "faceid", "ip-adapter-faceid_sd15")
    with pytest.raises(pack.core.AdapterError, match=message):
        old["IPAdapterUnifiedLoaderFaceID"]().load_models(models["sd15"], "FACEID", 0.0, "CPU")


def test_files_that_are_not_needed_are_not_read(old, face_models, own_folder):
    folder = face_models.write_pack(own_folder)
    (folder / "genderage.onnx").write_bytes(b"damaged")
    (analysis,) = old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")
    assert set(analysis.models) == {"detection", "recognition"}


def test_a_provider_that_is_missing(old, face_models, own_folder, faces, caplog):
    """Old workflows name the CUDA of another computer; onnxruntime went on with the CPU, so it does here."""
    face_models.write_pack(own_folder)
    (analysis,) = old["IPAdapterInsightFaceLoader"]().load_insightface("CUDA", "buffalo_l")
    assert analysis.det_model.session.get_providers() == ["CPUExecutionProvider"]
    assert "offers CPU, not CUDA. The CPU runs the face models of buffalo_l." in caplog.text


def test_face_models_of_another_width(pack, old, face_models, models, adapter_file, own_folder, faces):
    face_models.write_pack(own_folder, width=256)
    (analysis,) = old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "buffalo_l")
    kind, file, options = KINDS["faceid"]
    (adapter,) = old["IPAdapterModelLoader"]().load_ipadapter_model(adapter_file("sd15", kind, file, **options))
    apply = old["IPAdapterFaceID"]().apply_ipadapter
    with pytest.raises(pack.core.AdapterError, match=r"makes face embeddings of 256, .* takes 512\."):
        apply(models["sd15"], adapter, image=faces[:1], insightface=analysis)
    del analysis.models["recognition"]  # as other packs load them
    with pytest.raises(pack.core.AdapterError, match="has no recognition model"):
        apply(models["sd15"], adapter, image=faces[:1], insightface=analysis)


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
