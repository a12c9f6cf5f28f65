"""What the old nodes refuse, whoever calls them: what no image prompt can be made of. All else passes, as before."""

from __future__ import annotations

import asyncio
import functools
import inspect

import pytest
import torch

NAN, INF = torch.nan, torch.inf


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
def apply(old, models, adapter, vision, image):
    """Applies to SD1.5 with one of the old nodes."""

    def run(name="IPAdapterAdvanced", **given):
        node = old[name]()
        inputs = {"model": models["sd15"], "ipadapter": adapter, "clip_vision": vision, "image": image, **given}
        if node.FUNCTION == "apply_tiled":
            defaults = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0, "sharpening": 0.0}
            inputs = {**defaults, **inputs}
        return getattr(node, node.FUNCTION)(**inputs)[0]

    return run


@pytest.fixture
def refuse(pack):
    """Asserts that a call is refused with these words."""

    def check(words, call, *args, **kwargs):
        with pytest.raises(pack.core.AdapterError, match=words):
            call(*args, **kwargs)

    return check


def spoiled(tensor, value):
    copy = tensor.clone()
    copy.view(-1)[7] = value
    return copy


IMAGES = ("image", "image_style", "image_composition", "image_negative", "image_optional")
MASKS = ("attn_mask", "mask")
EMBEDS = ("pos_embed", "neg_embed", "embeds", "embed1", "embed2", "embed5")


def test_every_old_node_checks_its_arguments(pack, old):
    """At the one method that ComfyUI and other packs call."""
    for name, node in old.items():
        method = getattr(node, node.FUNCTION).__func__
        assert hasattr(method, "__wrapped__"), name
        assert inspect.signature(method) == inspect.signature(method.__wrapped__)


def test_every_image_mask_embeds_and_number_of_every_old_node(pack, old, refuse):
    """With nothing else right: the argument is refused before anything is done."""
    seen = set()
    for node in old.values():
        method = getattr(node(), node.FUNCTION)
        parameters = inspect.signature(method).parameters
        needed = {key: None for key, each in parameters.items() if each.default is each.empty}
        for key in parameters:
            if key in IMAGES:
                bad = [(torch.zeros(0, 8, 8, 3), "has the shape"), (torch.zeros(1, 8, 8, 2), "has the shape")]
                bad += [(torch.zeros(8, 8, 3), "has the shape"), (torch.full((2, 8, 8, 3), NAN), "1 of 2 holds NaN")]
            elif key in MASKS:
                bad = [(torch.zeros(0, 8, 8), "has the shape"), (torch.zeros(1, 8, 0), "has the shape")]
                bad += [(torch.full((1, 8, 8), INF), "holds NaN or infinity")]
            elif key in EMBEDS:
                bad = [(torch.zeros(0, 8), "has the shape"), (torch.full((1, 8), NAN), "holds NaN or infinity")]
            elif key.startswith("weight") and key not in ("weight_type", "weights", "weights_strategy"):
                bad = [(NAN, f"{key} is nan"), ([0.5, -INF], f"{key} is -inf")]
            elif key in ("start_at", "strength", "sharpening", "style_boost", "enhance_ratio", "image_weight"):
                bad = [(NAN, f"{key} is nan")]
            else:
                continue
            seen.add(key)
            for value, words in bad:
                refuse(words, method, **{**needed, key: value})
    assert {*IMAGES, *MASKS, *EMBEDS, "weight", "weights_1", "weight_kolors", "image_weight", "strength"} <= seen


def test_parameters_on_one_wire(old, apply, refuse, image, mask):
    regional = old["IPAdapterRegionalConditioning"]().conditioning
    good, other = (regional(image, weight, 1.0, "linear", 0.0, 1.0, mask=mask)[0] for weight in (0.5, 0.8))
    for key, value, words in (
        ("attn_mask", spoiled(mask, NAN), "attn_mask holds NaN"),
        ("weight", INF, "weight is inf"),
        ("image", image[:0], "image has the shape"),
    ):
        refuse(words, old["IPAdapterCombineParams"]().combine, good, {**other, key: [value]})
        refuse(words, apply, "IPAdapterFromParams", image=None, ipadapter_params={**good, key: [value]})


def test_numbers_in_a_text(old, apply, refuse):
    refuse("'3:nan' is no pair", apply, "IPAdapterMS", layer_weights="1:1, 3:nan")
    refuse("'6:1e999' is no pair", apply, "IPAdapterMS", layer_weights="6:1e999")
    for text in ("nan,1", "1, -inf"):
        refuse("is no number", old["IPAdapterWeights"]().weights, text)


def test_what_the_old_pack_takes_beyond_the_widgets_passes(apply, run, models, image, mask):
    """A weight, an image and a mask out of their ranges; a mask of one channel; grey and transparent images."""
    plain, base = run(apply(), "sd15"), run(models["sd15"], "sd15")
    images = {"light": image * 2, "grey": image[..., :1], "alpha": torch.cat([image, image[..., :1]], dim=-1)}
    results = {name: run(apply(image=value), "sd15") for name, value in images.items()}
    assert torch.equal(results["alpha"], plain)
    results |= {"heavy": run(apply(weight=7.0), "sd15"), "strong": run(apply(attn_mask=mask * 2), "sd15")}
    assert all(torch.isfinite(result).all() for result in results.values())
    assert all(not torch.equal(result, base) for result in results.values())
    assert not torch.equal(results["strong"], run(apply(attn_mask=mask), "sd15"))
    assert torch.equal(run(apply(attn_mask=mask[:, None]), "sd15"), run(apply(attn_mask=mask), "sd15"))


def test_no_way_in_lets_nan_pass(pack, world, refuse):
    """The last look, where `checked` is off: other code may come there."""
    layers = [pack.core.LayerWeight(1.0)] * 16
    call = functools.partial(pack.install.apply_prompt, node="Test")
    given = (world.model, world.adapter, world.prompt)
    refuse("weight is nan", call, *given, weights=[pack.core.LayerWeight(NAN)] * 16, checked=False)
    refuse("attn_mask holds NaN", call, *given, weights=layers, checked=False, attn_mask=torch.full((8, 8), NAN))
    refuse("attn_mask has the shape", call, *given, weights=layers, checked=False, attn_mask=torch.zeros(0, 8, 8))


def test_more_tiles_than_pixels(apply, refuse, image):
    refuse(
        "1 x 80 pixels cannot be cut into 16",
        apply,
        "IPAdapterClipVisionEnhancer",
        image=image[:, :1],
        enhance_tiles=16,
    )
    assert apply("IPAdapterClipVisionEnhancer", image=image[:, :2, :2], enhance_tiles=2) is not None


def test_fading_needs_two_images(old, refuse, image):
    for method in ("shift batches", "alternate batches"):
        call = old["IPAdapterWeights"]().weights
        refuse(f"method '{method}' .* image has 1", call, "1, 0", method=method, image=image)
        assert call("1, 0", method=method, image=image.repeat(2, 1, 1, 1))[0]
        strategy = call("1, 0", method=method)[-1]
        refuse("at least two", old["IPAdapterWeightsFromStrategy"]().weights, weights_strategy=strategy, image=image)
    assert old["IPAdapterWeights"]().weights("1, 0", method="full batch", image=image)[0] == [1.0, 0.0]


def test_a_damaged_encoder_is_named(apply, refuse, vision):
    import copy

    damaged = copy.deepcopy(vision)
    damaged.model.visual_projection.weight.fill_(NAN)
    refuse("image encoder makes NaN or infinity", apply, clip_vision=damaged)


def test_features_are_looked_at_before_the_adapter_is_blamed(pack, world, refuse):
    for value in (NAN, INF):
        encoded = pack.types.EncodedImages(spoiled(world.prompt.positive.image, value))
        prompt = pack.types.ImagePrompt(encoded, adapter=world.adapter.name)
        refuse("image prompt holds NaN or infinity", pack.types.project, world.adapter, prompt)
        prompt = pack.types.ImagePrompt(world.prompt.positive, encoded, world.adapter.name)
        refuse("image prompt holds NaN or infinity", pack.types.project, world.adapter, prompt)


def validate(pack, old, name, **given):
    """As ComfyUI does before it queues a graph; returns what it finds wrong with the node."""
    import execution

    import nodes

    saved = dict(nodes.NODE_CLASS_MAPPINGS)
    nodes.NODE_CLASS_MAPPINGS.update(old)
    try:
        types = old[name].INPUT_TYPES()["required"]
        inputs = {}
        for key, (kind, *rest) in types.items():
            if isinstance(kind, list):
                inputs[key] = kind[0] if kind else ""
            elif kind in ("FLOAT", "INT", "STRING", "BOOLEAN"):
                inputs[key] = rest[0].get("default")
        prompt = {"1": {"class_type": name, "inputs": {**inputs, **given}}}
        valid, found, _ = asyncio.run(execution.validate_inputs("id", prompt, "1", {}))
        wires = [error for error in found if error["type"] == "required_input_missing"]
        return valid, [error for error in found if error not in wires]
    finally:
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(saved)


FORMER = ["original", "style transfer (SDXL)", "composition (SDXL)", "style transfer (SDXL only)"]


@pytest.mark.parametrize("former", FORMER)
def test_former_weight_types_pass_and_are_not_listed(pack, old, apply, run, former):
    now = pack.core.parse_weight_type(former)
    with_types = [name for name, node in old.items() if "weight_type" in node.INPUT_TYPES()["required"]]
    assert len(with_types) == 14, with_types
    for name in with_types:
        if name == "IPAdapter" and now == "composition":
            continue
        assert validate(pack, old, name, weight_type=former)[1] == [], name
        assert former not in old[name].INPUT_TYPES()["required"]["weight_type"][0]
    assert torch.equal(run(apply(weight_type=former), "sd15"), run(apply(weight_type=now), "sd15"))


def test_other_weight_types_do_not_pass(pack, old):
    for name, wrong in (
        ("IPAdapterAdvanced", "sideways"),
        ("IPAdapter", "ease in"),
        ("IPAdapter", "composition (SDXL)"),
    ):
        _, found = validate(pack, old, name, weight_type=wrong)
        assert len(found) == 1 and wrong in found[0]["details"] and "Choose one of" in found[0]["details"]
    _, found = validate(pack, old, "IPAdapterAdvanced", combine_embeds="sideways")
    assert [error["type"] for error in found] == ["value_not_in_list"], "the other lists are still looked at"


def test_a_setting_with_a_byte_order_mark(pack, tmp_path, monkeypatch, caplog):
    """As the editors and shells of Windows write it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "ip-adapter-kit.json").write_text('{"old_names": "corrected"}', encoding=encoding)
        assert pack.setting.mode() == "corrected", encoding
    assert not caplog.records
    (tmp_path / "ip-adapter-kit.json").write_bytes(b"\xff\xfe\xff")
    assert pack.setting.mode() == "same images"
    assert "cannot be read" in caplog.text


def test_the_log_names_the_node_of_the_graph(old, apply, run, image, caplog):
    run(apply("IPAdapterBatch", image=image.repeat(3, 1, 1, 1)), "sd15", batch=1)
    title = old["IPAdapterBatch"].TITLE
    assert f"{title}: The image prompt has 3 images" in caplog.text
    assert "connect fewer images" in caplog.text
    assert "Apply IP Adapter" not in caplog.text and "one_each" not in caplog.text
