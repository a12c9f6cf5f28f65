"""Images and masks of 16 bits, as ComfyUI makes them with --fp16-intermediates, are taken as float32."""

from __future__ import annotations

import pytest
import torch

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def image():
    """Bright: the sum of its values, which seeds the noise, is beyond float16."""
    return torch.rand(1, 300, 400, 3, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5


@pytest.fixture
def mask():
    return torch.rand(1, 224, 224, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def adapter(old, adapter_file):
    return old["IPAdapterModelLoader"]().load_ipadapter_model(ipadapter_file=adapter_file("sd15"))[0]


def test_every_image_and_mask_of_every_old_node(pack, old):
    """By the types of its inputs; other tensors and the usual dtypes stay as they are."""
    seen = set()
    for name, node in old.items():
        types = node.INPUT_TYPES()
        for key, (kind, *_) in {**types["required"], **types.get("optional", {})}.items():
            shape = {"IMAGE": (1, 8, 8, 3), "MASK": (1, 8, 8)}.get(kind)
            if shape is None:
                continue
            seen.add(key)
            for dtype in (*HALVES, torch.float32, torch.float64):
                value = torch.rand(shape).to(dtype)
                got = pack.inputs._usable(key, value)
                kept = dtype not in HALVES
                assert got.dtype == (dtype if kept else torch.float32), (name, key)
                assert torch.equal(got, value if kept else value.float())
    assert {"image", "image_style", "image_negative", "image_optional", "attn_mask", "mask"} <= seen
    embeds = torch.rand(1, 8).half()
    assert pack.inputs._usable("pos_embed", embeds) is embeds


@pytest.mark.parametrize("dtype", HALVES)
def test_noise_and_prepared_images(old, image, dtype):
    half = image.to(dtype)
    noise, prepare = old["IPAdapterNoise"]().make_noise, old["PrepImageForClipVision"]().prep_image
    for kind in ("fade", "dissolve", "gaussian", "shuffle"):
        assert torch.equal(noise(kind, 0.5, 3, image_optional=half)[0], noise(kind, 0.5, 3, half.float())[0])
    assert torch.equal(prepare(half, sharpening=0.3)[0], prepare(half.float(), sharpening=0.3)[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_encoded_and_applied_on_the_cpu(old, models, run, vision, adapter, image, mask, dtype):
    def results(image, mask):
        given = {"model": models["sd15"], "ipadapter": adapter, "clip_vision": vision, "image": image}
        patched = old["IPAdapterAdvanced"]().apply_ipadapter(**given, image_negative=image.flip(1), attn_mask=mask)[0]
        embeds = old["IPAdapterEncoder"]().encode(adapter, image, 1.0, mask=mask, clip_vision=vision)
        return [run(patched, "sd15"), *embeds]

    image, mask = image.to(dtype), mask.to(dtype)
    for half, single in zip(results(image, mask), results(image.float(), mask.float()), strict=True):
        assert torch.equal(half, single)
