"""Encode Face Prompt: from an image to the model, against diffusers' own face adapters and insightface's own calls."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

EMBEDS = 48  # channels of the tiny image encoder's hidden states


@pytest.fixture(scope="module")
def faces(face_models, pack, tmp_path_factory):
    """Loaded face models, images with faces, and the answers of insightface called as its documentation does."""
    import folder_paths
    from insightface.app import FaceAnalysis
    from insightface.utils.face_align import norm_crop

    root = tmp_path_factory.mktemp("insightface")
    folder = face_models.write_pack(root / "models" / "buffalo_l")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(root)], set()))
        (models,) = pack.LoadFaceAnalysis.execute("buffalo_l").args
    own = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    own.prepare(ctx_id=0, det_size=(640, 640))
    image = torch.stack([face_models.draw_faces((32, 10, 9)), face_models.draw_faces((16, 11, 12), (8, 60, 30))])

    def seen(pixels, size=224):
        bgr = (pixels.numpy()[..., ::-1] * 255).astype(np.uint8)
        found = max(own.get(bgr), key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
        crop = norm_crop(bgr, landmark=found.kps, image_size=size)[..., ::-1].astype(np.float32) / 255
        return SimpleNamespace(
            normed=torch.from_numpy(found.normed_embedding)[None],
            raw=torch.from_numpy(found.embedding)[None],
            crop=torch.from_numpy(crop)[None],
        )

    nobody = face_models.draw_faces()[None]
    return SimpleNamespace(models=models, image=image, seen=seen, nobody=nobody, draw=face_models.draw_faces)


def new_face_adapter(pack, world, model, kind="faceid", seed=42, folder=None, **options):
    """A random face adapter that fits the model; with `folder` by way of a file."""
    import comfy.ops

    sites = pack.core.cross_attention_sites(model.get_model_object("diffusion_model"))
    if kind == "faceid-plus":
        options = {
            "image_dim": EMBEDS,
            "depth": 4,
            "dim_head": 64,
            **options,
        }  # depth and heads that diffusers builds
    spec = pack.core.new_spec(kind, [site.dim for site in sites], sites[0].cross_attention_dim, lora_rank=3, **options)
    adapter = pack.core.IPAdapter(spec, operations=comfy.ops.manual_cast)
    world.randomise(adapter, seed, scale=0.15)
    if folder is not None:
        pack.core.save_adapter(folder / "face.safetensors", adapter)
        adapter = pack.core.load_adapter(folder / "face.safetensors", operations=comfy.ops.manual_cast)
    return pack.types.manage("face.safetensors", adapter.eval())


def encode(pack, faces, ip_adapter, image=None, **options):
    image = faces.image[:1] if image is None else image
    return pack.EncodeFacePrompt.execute(ip_adapter, faces.models, image, **options).args[0]


@pytest.fixture(scope="module")
def both(pack, world, tmp_path_factory):
    """A tiny diffusers UNet in SD1.5's layout, and ComfyUI's model with its weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    folder = tmp_path_factory.mktemp("unet")
    with torch.inference_mode():
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=32,
        ).eval()
        world.randomise(unet, seed=41)
        unet.save_pretrained(str(folder))
        return unet, pack.demo_model.load_unet(folder)


CASES = {
    "faceid": ("faceid", {}, 1.0),
    "portrait": ("portrait", {}, 1.0),
    "plus v1": ("faceid-plus", {"shortcut": False}, 1.0),
    "plus v2": ("faceid-plus", {"shortcut": True}, 1.0),
    "plus v2, likeness 2": ("faceid-plus", {"shortcut": True}, 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_equality_with_diffusers_own_face_adapters(pack, world, faces, both, encoder, tmp_path, case):
    """From the image to what the UNet makes. On the other side insightface's own calls, ComfyUI's own image encoder,
    diffusers' own projectors and attention, and a LoRA that is added to the weights by hand.
    """
    import diffusers

    kind, options, likeness = CASES[case]
    unet, model = both
    ip_adapter = new_face_adapter(pack, world, model, kind, folder=tmp_path, **options)
    clip = {"clip_vision": encoder, "likeness": likeness} if kind == "faceid-plus" else {}
    prompt = encode(pack, faces, ip_adapter, **clip)
    patched = world.apply(model, ip_adapter, prompt, weight=0.8, lora_strength=0.6)
    calls = []
    hook = patched.model.diffusion_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((*args, kwargs["context"], output)), with_kwargs=True
    )
    try:
        world.sample(patched, steps=3)
    finally:
        hook.remove()

    seen = faces.seen(faces.image[0])
    own = diffusers.UNet2DConditionModel.from_config(unet.config).eval()
    own.load_state_dict(unet.state_dict())
    adapter, file = ip_adapter.adapter, pack.core.read_checkpoint(tmp_path / "face.safetensors")
    if ip_adapter.lora is not None:
        modules = dict(own.named_modules())
        for name, id in pack.core.layers.attention_ids(own.attn_processors).items():
            attention = modules[name.removesuffix(".processor")]
            for part in ("to_q", "to_k", "to_v", "to_out"):
                linear = attention.to_out[0] if part == "to_out" else getattr(attention, part)
                up, down = (file.ip_adapter[f"{id}.{part}_lora.{side}.weight"] for side in ("up", "down"))
                linear.weight += 0.6 * up @ down
    state = {
        "image_proj": {name: file.image_proj[name] for name in file.image_proj},
        "ip_adapter": dict(adapter.layers.state_dict()),
    }
    own._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    if kind == "faceid-plus":
        projection = own.encoder_hid_proj.image_projection_layers[0]
        projection.shortcut, projection.shortcut_scale = options["shortcut"], likeness
        pixels = torch.nn.functional.interpolate(
            seen.crop.movedim(-1, 1), size=(32, 32), mode="bicubic", antialias=True
        ).clamp(0, 1)
        states = encoder.encode_image(pixels.movedim(1, -1), crop=False)["penultimate_hidden_states"]
        nothing = encoder.model(pixel_values=torch.zeros(1, 3, 32, 32), intermediate_output=-2)[1]
        projection.clip_embeds = torch.stack([nothing, states])  # negative first, as the chunks; one image each
    image_embeds = torch.stack([torch.zeros_like(seen.normed), seen.normed])
    for processor in own.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.8]
    assert len(calls) == 3
    for latents, timestep, context, output in calls:
        want = own(latents, timestep, context, added_cond_kwargs={"image_embeds": [image_embeds]}).sample
        torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)
        without = unet(latents, timestep, context).sample
        assert (want - without).abs().max() > 0.02 * without.abs().max()


def test_raw_embeddings_for_portrait_unnorm(pack, world, faces, tmp_path):
    """A resampler over one raw embedding, recognised from a file's shapes as a published one."""
    import comfy.ops
    from safetensors.torch import save_file

    ip_adapter = new_face_adapter(pack, world, world.model, "portrait", num_tokens=16)
    plus = pack.core.new_spec(
        "plus", ip_adapter.spec.layer_dims, 64, image_dim=512, num_tokens=16, resampler_dim=64, depth=1
    )
    adapter = pack.core.IPAdapter(plus, operations=comfy.ops.manual_cast)
    world.randomise(adapter, 5, scale=0.2)
    state = {name: tensor.contiguous() for name, tensor in pack.core.export_state(adapter).items()}
    save_file(state, str(tmp_path / "unnorm.safetensors"))
    loaded = pack.core.load_adapter(tmp_path / "unnorm.safetensors", operations=comfy.ops.manual_cast)
    assert loaded.spec.kind == "portrait" and loaded.spec.unnormalised
    unnorm = pack.types.manage("unnorm.safetensors", loaded)
    seen = faces.seen(faces.image[0])
    assert torch.allclose(encode(pack, faces, unnorm).positive.face, seen.raw, atol=1e-5)
    assert torch.allclose(encode(pack, faces, ip_adapter).positive.face, seen.normed, atol=1e-6)
    assert not torch.allclose(seen.raw, seen.normed, atol=0.5)


@pytest.mark.parametrize("kind", ["faceid", "faceid-plus"])
def test_several_faces(pack, world, faces, encoder, kind):
    ip_adapter = new_face_adapter(pack, world, world.model, kind, shortcut=True)
    clip = {"clip_vision": encoder} if kind == "faceid-plus" else {}
    seen = [faces.seen(pixels) for pixels in faces.image]
    joined = encode(pack, faces, ip_adapter, faces.image, weight=0.7, **clip)
    assert torch.allclose(joined.positive.face, torch.cat([one.normed for one in seen]), atol=1e-6)
    assert joined.positive.weights == (0.7, 0.7) and not joined.has_negative
    mean = encode(pack, faces, ip_adapter, faces.image, combine="average", **clip)
    assert torch.allclose(mean.positive.face, joined.positive.face.mean(0, keepdim=True), atol=1e-6)
    if clip:
        assert torch.allclose(mean.positive.image, joined.positive.image.mean(0, keepdim=True), atol=1e-6)
        assert joined.positive.image.shape == (2, 5, EMBEDS) and joined.negative.face.abs().max() == 0
    else:
        assert joined.positive.image is None and joined.negative is None
    single = encode(pack, faces, ip_adapter, faces.image[1:], **clip)
    assert not torch.allclose(single.positive.face, mean.positive.face, atol=1e-3)


def test_which_face(pack, world, faces):
    ip_adapter = new_face_adapter(pack, world, world.model)
    group = faces.draw((16, 11, 12), (8, 60, 30), (32, 17, 4))[None]  # middle, small and large, from left to right
    node = pack.EncodeFacePrompt.execute

    def embedding(**options):
        return node(ip_adapter, faces.models, group, **options).args[0].positive.face

    largest = embedding()
    assert torch.equal(largest, embedding(face="left to right", face_index=2))
    assert torch.equal(embedding(face="left to right"), embedding(face_index=1))
    assert not torch.allclose(largest, embedding(face_index=1), atol=1e-3)


def test_the_crop_is_shown_and_given(pack, world, faces):
    ip_adapter = new_face_adapter(pack, world, world.model)
    output = pack.EncodeFacePrompt.execute(ip_adapter, faces.models, faces.image)
    assert output.args[1].shape == (2, 224, 224, 3)
    assert torch.allclose(output.args[1][:1], faces.seen(faces.image[0]).crop, atol=1e-6)
    assert len(output.ui.as_dict()["images"]) == 2
    spec = pack.core.new_spec("faceid", (640,) * 4, 2048)
    assert pack.face.crop_size(spec) == 256 and pack.face.crop_size(ip_adapter.spec) == 224


def test_image_negative_of_faceid_plus(pack, world, faces, encoder):
    ip_adapter = new_face_adapter(pack, world, world.model, "faceid-plus", shortcut=True)
    unwanted = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    prompt = encode(pack, faces, ip_adapter, clip_vision=encoder, image_negative=unwanted, weight=0.5)
    want = encoder.encode_image(unwanted, crop=False)["penultimate_hidden_states"]
    assert torch.allclose(prompt.negative.image, want, atol=1e-5) and prompt.has_negative
    assert prompt.negative.face.shape == (1, 512) and not prompt.negative.face.any()
    assert prompt.negative.weights == (0.5,)


def test_one_face_for_each_frame(pack, world, faces):
    """Frame i is as with face i alone; a frame whose image has no face is as without the adapter."""
    ip_adapter = new_face_adapter(pack, world, world.model, seed=9)
    images = torch.cat([faces.image[:1], faces.nobody, faces.image[1:]])
    options = {"weight": 0.9, "lora_strength": 0.0}
    prompt = encode(pack, faces, ip_adapter, images, one_each=True, no_face="skip")
    assert prompt.positive.weights == (1.0, 0.0, 1.0)
    frames = world.sample(world.apply(world.model, ip_adapter, prompt, **options), batch=3)
    base = world.sample(world.model, batch=3)
    for frame, image in ((0, faces.image[:1]), (2, faces.image[1:])):
        alone = world.apply(world.model, ip_adapter, encode(pack, faces, ip_adapter, image), **options)
        assert (frames[frame] - world.sample(alone, batch=3)[frame]).abs().max() < 1e-5 * base.abs().max()
    assert (frames[1] - base[1]).abs().max() < 1e-5 * base.abs().max()
    assert (frames[0] - base[0]).abs().max() > 1e-3 * base.abs().max()
    faded = encode(pack, faces, ip_adapter, images, one_each=True, no_face="skip", weight=0.5)
    assert faded.positive.weights == faded.negative.weights == (0.5, 0.0, 0.5)
    late = encode(pack, faces, ip_adapter, torch.cat([faces.nobody, faces.image[:1]]), one_each=True, no_face="skip")
    assert late.positive.weights == (0.0, 1.0)


def test_negative_images_of_frames(pack, world, faces, encoder):
    """One for all frames, or one for each; Apply names another number."""
    ip_adapter = new_face_adapter(pack, world, world.model, "faceid-plus", shortcut=True)
    images = torch.cat([faces.image[:1], faces.nobody, faces.image[1:]])
    unwanted = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    states = encoder.encode_image(unwanted, crop=False)["penultimate_hidden_states"]
    options = {"clip_vision": encoder, "one_each": True, "no_face": "skip"}
    each = encode(pack, faces, ip_adapter, images, image_negative=unwanted, **options).negative
    single = encode(pack, faces, ip_adapter, images, image_negative=unwanted[:1], **options).negative
    assert torch.allclose(each.image, states, atol=1e-5)
    assert torch.allclose(single.image, states[:1].expand(3, -1, -1), atol=1e-5)
    assert each.weights == single.weights == (1.0, 0.0, 1.0)
    two = encode(pack, faces, ip_adapter, images, image_negative=unwanted[:2], **options)
    with pytest.raises(pack.core.AdapterError, match="3 images, one for each latent, and 2 negative images"):
        world.apply(world.model, ip_adapter, two)


def test_lora_in_apply(pack, world, faces):
    ip_adapter = new_face_adapter(pack, world, world.model)
    prompt = encode(pack, faces, ip_adapter)
    usual = world.apply(world.model, ip_adapter, prompt)
    assert {patch[0] for patches in usual.patches.values() for patch in patches} == {0.6}
    assert len(usual.patches) == 8 * 16
    assert world.apply(world.model, ip_adapter, prompt, lora_strength=0.0).patches == {}
    assert world.apply(world.model, ip_adapter, prompt, weight=0.0).patches == {}  # switched off altogether
    assert torch.equal(world.sample(world.apply(world.model, ip_adapter, prompt, weight=0.0)), world.base)
    assert not torch.allclose(
        world.sample(usual), world.sample(world.apply(world.model, ip_adapter, prompt, lora_strength=1.0)), atol=1e-3
    )
    chained = world.apply(usual, ip_adapter, encode(pack, faces, ip_adapter, faces.image[1:]))
    assert {len(patches) for patches in chained.patches.values()} == {1}
    assert world.model.patches == {}


REFUSED = {
    "a base adapter": (
        "base",
        {},
        r"a\.safetensors is a base adapter, which takes no face embeddings\. .*Encode Image Prompt",
    ),
    "no encoder": ("faceid-plus", {}, r"which also looks at the image .*Connect the clip_vision"),
    "a negative image": ("faceid", {"image_negative": torch.zeros(1, 8, 8, 3)}, "image_negative would do nothing"),
    "likeness": ("faceid", {"likeness": 1.5}, r"likeness 1\.5 is for FaceID-Plus v2"),
    "combine": ("faceid", {"one_each": True, "combine": "average"}, "combine 'average' would do nothing"),
    "no face": ("faceid", {"image": "nobody"}, r"image shows no face that was found\."),
    "no face at all": ("faceid", {"image": "nobody", "no_face": "skip"}, "nothing is left to encode"),
    "a face that is not there": ("faceid", {"face_index": 4}, r"shows 1 face; face_index 4 is beyond"),
    "other face models": ("faceid", {"face_dim": 256}, r"makes face embeddings of 512, .* takes 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(pack, world, faces, case):
    kind, options, message = REFUSED[case]
    options = dict(options)
    image = faces.nobody if options.pop("image", None) else None
    width = {"face_dim": options.pop("face_dim")} if "face_dim" in options else {}
    ip_adapter = world.adapter if kind == "base" else new_face_adapter(pack, world, world.model, kind, **width)
    with pytest.raises(pack.core.AdapterError, match=message):
        encode(pack, faces, ip_adapter, image, **options)


def test_likeness_is_refused_for_version_1(pack, world, faces, encoder):
    ip_adapter = new_face_adapter(pack, world, world.model, "faceid-plus", shortcut=False)
    with pytest.raises(pack.core.AdapterError, match=r"likeness 2 is for FaceID-Plus v2"):
        encode(pack, faces, ip_adapter, clip_vision=encoder, likeness=2.0)


def test_a_face_adapter_belongs_to_encode_face_prompt(pack, world, faces, encoder):
    ip_adapter = new_face_adapter(pack, world, world.model)
    for clip_vision in (encoder, None):  # Load IP Adapter has none for it
        with pytest.raises(pack.core.AdapterError) as error:
            pack.EncodeImagePrompt.execute(ip_adapter, clip_vision, faces.image)
        assert re.search(r"face\.safetensors is a faceid adapter, .*Encode Face Prompt", str(error.value))
    for adapter, missing in ((world.adapter, "clip_vision"), (None, "ip_adapter")):
        with pytest.raises(pack.core.AdapterError, match=f"{missing} is connected to an output that has nothing"):
            pack.EncodeImagePrompt.execute(adapter, None, faces.image)


def test_the_wrong_image_encoder_is_named(pack, world, faces, encoder):
    ip_adapter = new_face_adapter(pack, world, world.model, "faceid-plus", shortcut=True, image_dim=56)
    with pytest.raises(pack.core.AdapterError, match=r"makes hidden states of 48; .* takes hidden states of 56"):
        encode(pack, faces, ip_adapter, clip_vision=encoder)
