"""The adapters for Kolors under the old names, beside the old pack: its FaceID and its plus, on a narrow UNet.

The widths by which both packs know Kolors are the real ones: tokens of 4096 or 2048, an encoder of 1024 at 336 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

WHOLE = {"start_at": 0.0, "end_at": 1.0}


@pytest.fixture(scope="module")
def kolors(world, models):
    """The tiny SDXL with the layer that narrows ChatGLM's states, as the packs that load Kolors put it there."""
    with torch.inference_mode():
        model = world.new_model("sdxl", context_dim=2048, seed=1, width=32)
        for name, weight in models["sdxl"].model.state_dict().items():
            assert torch.equal(weight, model.model.state_dict()[name])
        model.model.diffusion_model.encoder_hid_proj = projection = torch.nn.Linear(4096, 2048).requires_grad_(False)
        world.randomise(projection, seed=9, scale=0.02)
    return model


@pytest.fixture(scope="module")
def vision336(new_vision):
    return new_vision(336, 1024)


@pytest.fixture(scope="module")
def faces(face_models):
    images = torch.stack([face_models.draw_faces((16, 15, 12)), face_models.draw_faces((32, 9, 8))])
    tint = torch.rand(2, 20, 20, 3, generator=torch.Generator().manual_seed(3)).repeat_interleave(32, 1)
    return (images * (0.6 + 0.4 * tint.repeat_interleave(32, 2))).clamp(0, 1)


@pytest.fixture(scope="module")
def insightface(old, face_models, comfyui):
    """Both packs take the same; Kolors' adapter was trained with antelopev2."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / "insightface" / "models" / "antelopev2"
    face_models.write_pack(folder, detector="scrfd_10g_bnkps.onnx", recognizer="glintr100.onnx")
    return old["IPAdapterInsightFaceLoader"]().load_insightface("CPU", "antelopev2")[0]


@pytest.fixture
def shallow(peer, monkeypatch):
    """The old pack builds a resampler of depth 4, which is 3 GB at this width: here of depth 1."""
    module = sys.modules["the_old_pack.image_proj_models"]
    resampler = module.FacePerceiverResampler
    monkeypatch.setattr(module, "FacePerceiverResampler", lambda **options: resampler(**{**options, "depth": 1}))


@pytest.fixture(scope="module")
def face_file(adapter_file):
    changes = {"token_dim": 4096, "resampler_dim": 4096, "heads": 64, "depth": 1}
    options = {"image_dim": 1024, "num_tokens": 6, "lora_rank": None, "changes": changes}
    return adapter_file("sdxl", "faceid-plus", "Kolors-IP-Adapter-FaceID-Plus.safetensors", **options)


def test_the_faceid_file_is_known(pack, old, face_file):
    (adapter,) = old["IPAdapterModelLoader"]().load_ipadapter_model(face_file)
    spec = adapter.loaded.spec
    assert (spec.family_name, spec.kind, spec.token_dim, spec.shortcut) == ("Kolors", "faceid-plus", 4096, True)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_kolors": 0.4, "weight": 1.0, "weight_faceidv2": 0.7, "weight_type": "style transfer"},
        {"weight_kolors": 1.7, "weight": 0.5, "weight_type": "ease in-out", "embeds_scaling": "K+V w/ C penalty"},
    ],
)
def test_faceid(compare, changes, shallow, kolors, vision336, insightface, faces, face_file, options):
    given = {"model": kolors, "clip_vision": vision336, "insightface": insightface, "file": face_file, **WHOLE}
    given |= {"image": faces[:1], "image_negative": None, "attn_mask": None, "embeds_scaling": "V only", **options}
    changes([compare("IPAdapterFaceIDKolors", "sdxl", "faceid-plus", 0, **given)])


@pytest.mark.parametrize("name", ["IPAdapterFaceIDKolors", "IPAAdapterFaceIDBatch"])
def test_several_faces_and_random_inputs(
    compare, changes, shallow, kolors, vision336, insightface, faces, face_file, name
):
    given = {"model": kolors, "clip_vision": vision336, "insightface": insightface, "file": face_file, **WHOLE}
    changes([compare(name, "sdxl", "faceid-plus", 2, batch=3, image=faces, **given)])


def test_weight_kolors_acts_on_kolors_alone(
    pack, old, models, kolors, run, vision336, insightface, faces, face_file, adapter_file
):
    """In the old pack it multiplies the model's projection, which no other adapter passes."""

    def sampled(model, file, vision, weight):
        (adapter,) = old["IPAdapterModelLoader"]().load_ipadapter_model(file)
        made, _ = old["IPAdapterFaceIDKolors"]().apply_ipadapter(
            model, adapter, image=faces[:1], clip_vision=vision, insightface=insightface, weight_kolors=weight
        )
        return run(made, "sdxl")

    full, half = (sampled(kolors, face_file, vision336, weight) for weight in (1.0, 0.5))
    assert not torch.allclose(full, half, atol=1e-2)
    other = adapter_file("sdxl", "faceid", lora_rank=8)
    assert torch.equal(*(sampled(models["sdxl"], other, None, weight) for weight in (1.0, 0.5)))


def test_plus(compare, changes, kolors, vision336, adapter_file):
    options = {"image_dim": 1024, "resampler_dim": 2048, "num_tokens": 16, "changes": {"heads": 12, "dim_head": 64}}
    file = adapter_file("sdxl", "plus", "ip_adapter_plus_general.safetensors", **options)
    given = {"model": kolors, "clip_vision": vision336, "file": file, **WHOLE}
    changes([compare("IPAdapterAdvanced", "sdxl", "plus", seed, **given) for seed in (0, 1)])
    changes([compare("IPAdapterBatch", "sdxl", "plus", 3, batch=3, **given)])
