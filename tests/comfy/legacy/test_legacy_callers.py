"""Other packs take the old classes out of NODE_CLASS_MAPPINGS and call them: in these styles, read in their code."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def image():
    return torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def adapter(old, adapter_file):
    return old["IPAdapterModelLoader"]().load_ipadapter_model(ipadapter_file=adapter_file("sd15"))[0]


@pytest.fixture
def pipeline(adapter, vision):
    """What Easy-Use builds itself, with tensors by name."""
    raw = {"image_proj": dict(adapter["image_proj"]), "ip_adapter": dict(adapter["ip_adapter"])}
    return {
        "clipvision": {"file": "a", "model": vision},
        "ipadapter": {"file": "b", "model": raw},
        "insightface": {"provider": None, "model": None},
    }


def acts(run, models, model):
    """The model is another one, and the image prompt changes its latents."""
    assert model is not models["sd15"]
    return float((run(model, "sd15") - run(models["sd15"], "sd15")).abs().max()) > 1e-2


def test_impact_and_inspire_pack(old, models, run, adapter, vision, image, mask):
    common = {"weight": 0.8, "weight_type": "ease in", "start_at": 0.0, "end_at": 1.0}
    model = old["IPAdapterAdvanced"]().apply_ipadapter(
        model=models["sd15"],
        ipadapter=adapter,
        combine_embeds="concat",
        clip_vision=vision,
        image=image,
        image_negative=None,
        attn_mask=mask,
        insightface=None,
        weight_faceidv2=False,
        **common,
    )[0]
    assert acts(run, models, model)
    positive, _ = old["IPAdapterEncoder"]().encode(adapter, image, 1.0, clip_vision=vision)
    model = old["IPAdapterEmbeds"]().apply_ipadapter(
        model=models["sd15"],
        ipadapter=adapter,
        pos_embed=positive,
        neg_embed=None,
        attn_mask=mask,
        clip_vision=vision,
        **common,
    )[0]
    assert acts(run, models, model)
    assert callable(old["IPAdapterInsightFaceLoader"]().load_insightface)


def test_easy_use(old, models, run, pipeline, vision, image, mask):
    base = models["sd15"]
    model, images = old["IPAdapter"]().apply_ipadapter(
        base, pipeline, image, 0.9, 0.0, 1.0, weight_type="standard", attn_mask=mask
    )
    assert images is None and acts(run, models, model)
    model, images, masks = old["IPAdapterTiled"]().apply_tiled(
        base,
        pipeline,
        image,
        0.9,
        "linear",
        0.0,
        1.0,
        sharpening=0.0,
        combine_embeds="concat",
        image_negative=None,
        attn_mask=mask,
        clip_vision=None,
        embeds_scaling="V only",
    )
    assert len(images) == len(masks) == 4 and acts(run, models, model)
    model, _ = old["IPAdapterAdvanced"]().apply_ipadapter(
        base,
        pipeline,
        weight=0.9,
        weight_type="linear",
        start_at=0.0,
        end_at=1.0,
        combine_embeds="concat",
        weight_faceidv2=1.0,
        image=image,
        image_negative=None,
        weight_style=1.0,
        weight_composition=1.0,
        image_style=None,
        image_composition=None,
        expand_style=False,
        clip_vision=None,
        attn_mask=mask,
        insightface=None,
        embeds_scaling="V only",
        layer_weights="0:1.0, 3:0.5",
        weight_kolors=0.9,
    )
    assert acts(run, models, model)
    positive, negative = old["IPAdapterEncoder"]().encode(pipeline, image, 1.0, None, clip_vision=vision)
    model, _ = old["IPAdapterEmbeds"]().apply_ipadapter(
        base, pipeline, positive, 0.9, "linear", 0.0, 1.0, neg_embed=negative, attn_mask=None, clip_vision=vision
    )
    assert acts(run, models, model)
    params, *_ = old["IPAdapterRegionalConditioning"]().conditioning(
        image, 0.9, 1.0, "linear", 0.0, 1.0, mask=mask, positive=None, negative=None
    )
    model, _ = old["IPAdapterFromParams"]().apply_ipadapter(
        base,
        pipeline,
        clip_vision=None,
        combine_embeds="max",
        embeds_scaling="V only",
        image_negative=None,
        ipadapter_params=params,
    )
    assert acts(run, models, model)


def test_scripts_that_call_by_function(old, models, run, adapter, vision, image):
    """As graphs that were exported to Python do."""
    node = old["IPAdapterAdvanced"]()
    inputs = {"model": models["sd15"], "ipadapter": adapter, "image": image, "clip_vision": vision}
    model = getattr(node, node.FUNCTION)(**inputs)[0]
    assert acts(run, models, model)
    assert type(node).EXECUTE_NORMALIZED(**inputs).result[0] is not model


def test_what_is_missing_is_a_sentence(pack, old, models, adapter, vision, image):
    error = pack.core.AdapterError
    advanced = old["IPAdapterAdvanced"]().apply_ipadapter
    with pytest.raises(error, match=r"needs an image encoder\. Connect clip_vision"):
        advanced(models["sd15"], adapter, image=image)
    with pytest.raises(error, match="Connect IPAdapter Unified Loader"):
        old["IPAdapter"]().apply_ipadapter(models["sd15"], adapter, image, 1.0, 0.0, 1.0, "standard")
    with pytest.raises(error, match="expected image_proj and ip_adapter"):
        advanced(models["sd15"], {"something": 1}, image=image, clip_vision=vision)
    with pytest.raises(error, match=r"'3=1' is no pair"):
        advanced(models["sd15"], adapter, image=image, clip_vision=vision, layer_weights="3=1")
    with pytest.raises(error, match="SDXL models"):
        advanced(models["sd15"], adapter, image_style=image, clip_vision=vision)
    with pytest.raises(error, match="is made for a model of context 768"):
        advanced(models["sdxl"], adapter, image=image, clip_vision=vision)


def test_without_an_image_nothing_is_applied(old, models, run, adapter, vision):
    """The old node stops with an UnboundLocalError."""
    model, faces = old["IPAdapterAdvanced"]().apply_ipadapter(models["sd15"], adapter, image=None, clip_vision=vision)
    assert faces is None
    assert torch.equal(run(model, "sd15"), run(models["sd15"], "sd15"))


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"start_at": 0.6, "end_at": 0.6}, {"attn_mask": "zeros"}])
def test_what_does_nothing_runs_as_it_did(old, models, run, adapter, vision, image, options):
    """Our own nodes refuse it; old workflows have it."""
    if "attn_mask" in options:
        options = {"attn_mask": torch.zeros(1, 64, 64)}
    model, _ = old["IPAdapterAdvanced"]().apply_ipadapter(
        models["sd15"], adapter, image=image, clip_vision=vision, **options
    )
    assert torch.equal(run(model, "sd15"), run(models["sd15"], "sd15"))


def test_the_setting_makes_them_right(pack, old, models, run, adapter, vision, image, tmp_path, monkeypatch):
    """The middle block gets the image prompt, as with Apply IP Adapter."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))

    def places():
        model, _ = old["IPAdapterAdvanced"]().apply_ipadapter(models["sd15"], adapter, image=image, clip_vision=vision)
        return {place[0] for place in model.model_options["transformer_options"]["patches_replace"]["attn2"]}

    assert places() == {"input", "output"}
    before = old["IPAdapterAdvanced"].fingerprint_inputs(weight=1.0)
    (tmp_path / "ip-adapter-kit.json").write_text('{"old_names": "corrected"}')
    assert places() == {"input", "middle", "output"}
    assert old["IPAdapterAdvanced"].fingerprint_inputs(weight=1.0) != before
    (tmp_path / "ip-adapter-kit.json").write_text('{"old_names": "nonsense"}')
    assert places() == {"input", "output"}
    (tmp_path / "ip-adapter-kit.json").write_text("nonsense")
    assert places() == {"input", "output"}


def test_the_setting_and_the_negative_of_plus_adapters(pack, old, vision, adapter_file, image, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    (adapter,) = old["IPAdapterModelLoader"]().load_ipadapter_model(adapter_file("sd15", "plus"))
    _, black = old["IPAdapterEncoder"]().encode(adapter, image, 1.0, clip_vision=vision)
    (tmp_path / "ip-adapter-kit.json").write_text('{"old_names": "corrected"}')
    _, trained = old["IPAdapterEncoder"]().encode(adapter, image, 1.0, clip_vision=vision)
    zeros = vision.model(pixel_values=torch.zeros(1, 3, 224, 224), intermediate_output=-2)[1]
    assert torch.allclose(trained, zeros, atol=1e-6) and not torch.allclose(trained, black, atol=1e-3)
