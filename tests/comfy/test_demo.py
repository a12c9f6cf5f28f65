"""Load IP Adapter Demo: the bundled model in ComfyUI's classes equals the same files in diffusers and transformers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def stack(pack):
    if not (pack.assets.emoji_folder() / pack.demo.ADAPTER).is_file():
        pytest.skip("assets/emoji holds no adapter")
    with torch.inference_mode():
        return dict(
            zip(
                ("model", "clip", "vae", "clip_vision", "ip_adapter"),
                pack.LoadIPAdapterDemo.execute().args,
                strict=True,
            )
        )


@pytest.fixture(scope="module")
def folder(pack):
    return pack.assets.emoji_folder() / pack.assets.MODEL


def sample(stack, world, model, steps=4):
    text = stack["clip"].encode_from_tokens_scheduled(stack["clip"].tokenize("rocket"))
    empty = stack["clip"].encode_from_tokens_scheduled(stack["clip"].tokenize(""))
    return world.sample(model, size=(16, 16), steps=steps, positive=text, negative=empty)


def test_a_image(stack, pack, world):
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(51))
    prompt = pack.EncodeImagePrompt.execute(stack["ip_adapter"], stack["clip_vision"], image).args[0]
    patched = world.apply(stack["model"], stack["ip_adapter"], prompt)
    drawn = stack["vae"].decode(sample(stack, world, patched))
    assert drawn.shape == (1, 128, 128, 3)
    assert drawn.std() > 0.02
    assert not torch.equal(drawn, stack["vae"].decode(sample(stack, world, stack["model"])))


def test_the_bundled_images(pack):
    names = pack.demo.list_images()
    assert len(names) == 8
    assert pack.DemoImage.define_schema().inputs[0].options == names
    for name in names:
        image = pack.DemoImage.execute(name).args[0]
        assert image.shape == (1, 128, 128, 3)
        assert image.min() >= 0.0 and image.max() == 1.0 and image.std() > 0.1
    with pytest.raises(pack.core.AdapterError, match=r"'\.\./secret'.*crab_twemoji"):
        pack.demo.load_image("../secret")


def test_an_adapter_of_ones_own(stack, pack, world, folders):
    """What `ipadapter demo` and `ipadapter train configs/emoji-base.toml` make, copied into models/ipadapter."""
    spec = stack["ip_adapter"].spec
    own = pack.core.IPAdapter(spec)
    world.randomise(own, seed=8)
    pack.core.save_adapter(folders["ipadapter"] / "named after nothing.safetensors", own)
    pack.core.save_adapter(folders["ipadapter"] / "for another model.safetensors", world.adapter.adapter)
    plus = pack.core.new_spec("plus", spec.layer_dims, spec.cross_attention_dim, image_dim=48, dim_head=16, depth=1)
    pack.core.save_adapter(folders["ipadapter"] / "on another encoder.safetensors", pack.core.IPAdapter(plus))
    (folders["ipadapter"] / "no model.safetensors").write_bytes(b"x")
    assert pack.demo.list_adapters() == ["named after nothing.safetensors"]
    options = pack.LoadIPAdapterDemo.define_schema().inputs[0].options
    assert options == ["the emoji adapter", "the emoji adapter (base)", "named after nothing.safetensors"]
    before = pack.LoadIPAdapterDemo.fingerprint_inputs(options[2])
    loaded = pack.LoadIPAdapterDemo.execute(options[2]).args[4]
    assert loaded.name == options[2]
    for key, tensor in pack.core.export_state(loaded.adapter).items():
        torch.testing.assert_close(tensor, pack.core.export_state(own)[key])
    image = torch.rand(1, 128, 128, 3)
    prompt = pack.EncodeImagePrompt.execute(loaded, stack["clip_vision"], image).args[0]
    drawn = sample(stack, world, world.apply(stack["model"], loaded, prompt))
    assert not torch.equal(drawn, sample(stack, world, stack["model"]))
    pack.core.save_adapter(folders["ipadapter"] / options[2], own, {"more": "metadata"})
    assert pack.LoadIPAdapterDemo.fingerprint_inputs(options[2]) != before


def test_an_adapter_of_this_model_in_the_other_loader(stack, pack, folders):
    (folders["ipadapter"] / "mine.safetensors").write_bytes(
        (pack.assets.emoji_folder() / pack.demo.ADAPTER).read_bytes()
    )
    with pytest.raises(pack.core.AdapterError, match=r"mine\.safetensors.*choose it in Load IP Adapter Demo"):
        pack.LoadIPAdapter.execute("mine.safetensors")


def test_both_kinds_come_with_the_pack(stack, pack, world):
    base = pack.LoadIPAdapterDemo.execute("the emoji adapter (base)").args[4]
    assert (stack["ip_adapter"].spec.kind, base.spec.kind) == ("plus", "base")
    prompt = pack.EncodeImagePrompt.execute(base, stack["clip_vision"], pack.demo.load_image("crab_twemoji")).args[0]
    drawn = sample(stack, world, world.apply(stack["model"], base, prompt))
    assert not torch.equal(drawn, sample(stack, world, stack["model"]))


def test_it_has_sixteen_sites(stack, pack):
    sites = pack.core.cross_attention_sites(stack["model"].get_model_object("diffusion_model"))
    assert len(sites) == 16
    pack.core.check_compatible(stack["ip_adapter"].spec, sites)


def test_the_unet_is_diffusers_own(stack, folder):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(folder / "unet"), low_cpu_mem_usage=False).float()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), torch.randn(2, 16, 128)
    ours = stack["model"].model.diffusion_model.float()(x, t, context=text)
    torch.testing.assert_close(ours, unet(x, t, text).sample, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_is_diffusers_own(stack, folder):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(str(folder / "vae"), low_cpu_mem_usage=False).float()
    latents = torch.randn(1, 4, 8, 8) * 4
    want = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(stack["vae"].decode(latents), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        stack["vae"].encode(want), vae.encode(want.movedim(-1, 1) * 2 - 1).latent_dist.mean, atol=1e-2, rtol=1e-2
    )


def test_the_encoders_are_transformers_own(stack, folder):
    from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerFast

    ids = PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))(
        "victory hand, noto style", padding="max_length", truncation=True, max_length=16
    ).input_ids
    tokens = stack["clip"].tokenize("victory hand, noto style")["l"][0]
    assert [token for token, _ in tokens] == ids
    vision = CLIPVisionModelWithProjection.from_pretrained(str(folder / "image_encoder")).float()
    pixels = torch.randn(1, 3, 128, 128)
    ours = stack["clip_vision"].model(pixel_values=pixels, intermediate_output=-2)
    theirs = vision(pixels, output_hidden_states=True)
    torch.testing.assert_close(ours[2], theirs.image_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], theirs.hidden_states[-2], atol=1e-4, rtol=1e-4)
