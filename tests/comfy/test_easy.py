"""Image Prompt: it finds the pair that fits by tensors, does what the other nodes do, and says what it did."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def image():
    return torch.rand(1, 40, 48, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def shelf(pack, world, folders, narrow, sound_state):
    """The model folders with an encoder, and a function that writes an adapter for a model."""
    state = {key: tensor * 0.1 if tensor.is_floating_point() else tensor for key, tensor in sound_state.items()}
    save_file(state, folders["clip_vision"] / "named after nothing.safetensors")

    def write(name, kind="base", model=world.model, seed=1):
        import folder_paths

        (folders["ipadapter"] / name).parent.mkdir(parents=True, exist_ok=True)
        pack.core.save_adapter(folders["ipadapter"] / name, world.new_adapter(model, seed=seed, kind=kind).adapter)
        folder_paths.filename_list_cache.clear()

    return write


def text_of(output):
    return output.ui["text"][0]


def by_hand(pack, world, name, image, model=None, **options):
    """The same with the three nodes."""
    adapter, encoder = pack.LoadIPAdapter.execute(name).args
    prompt = pack.EncodeImagePrompt.execute(adapter, encoder, image).args[0]
    return world.apply(world.model if model is None else model, adapter, prompt, **options)


def test_it_is_the_three_nodes_at_once(pack, world, shelf, image):
    shelf("a.safetensors", "plus")
    output = pack.ImagePrompt.execute(world.model, image)
    expected = world.sample(by_hand(pack, world, "a.safetensors", image, weight=0.7))
    torch.testing.assert_close(world.sample(output.args[0]), expected, atol=0, rtol=0)
    assert not torch.equal(expected, world.base)
    assert text_of(output).startswith("a.safetensors (plus adapter for a model of context 64) with named after nothing")
    assert len(output.ui["images"]) == 1
    torch.testing.assert_close(world.sample(world.model), world.base, atol=0, rtol=0)


def test_it_looks_at_tensors_and_not_at_names(pack, world, folders, shelf, image):
    wide = world.new_model(width=64)
    shelf("0 ip-adapter-plus_sd15.safetensors", "plus", wide)
    (folders["ipadapter"] / "1 ip-adapter-plus_sd15.safetensors").write_bytes(b"no model")
    save_file({"x": torch.ones(1)}, folders["ipadapter"] / "2 ip-adapter-plus_sd15.safetensors")
    faces = pack.core.new_spec(
        "portrait",
        [site.dim for site in pack.core.cross_attention_sites(world.model.model.diffusion_model)],
        64,
        num_tokens=4,
    )
    pack.core.save_adapter(folders["ipadapter"] / "3 plus.safetensors", pack.core.IPAdapter(faces))
    shelf("the base one.safetensors", "base")
    shelf("the plus one.safetensors", "plus")
    for likeness, expected in (("plus", "the plus one"), ("standard", "the base one"), ("light", "the base one")):
        assert text_of(pack.ImagePrompt.execute(world.model, image, likeness=likeness)).startswith(expected)
    assert text_of(pack.ImagePrompt.execute(wide, image)).startswith("0 ip-adapter-plus_sd15.safetensors")


def test_the_nearest_likeness_is_taken_and_said(pack, world, shelf, image):
    shelf("only.safetensors", "base")
    said = text_of(pack.ImagePrompt.execute(world.model, image, likeness="plus"))
    assert said.startswith("only.safetensors") and "asks for a plus adapter, of which none is usable here" in said
    assert "asks for" not in text_of(pack.ImagePrompt.execute(world.model, image, likeness="standard"))


# use_for, likeness -> the file
NAMED = [
    ("subject", "plus", "general.safetensors"),
    ("style", "plus", "general.safetensors"),
    ("face", "plus", "plus-face.safetensors"),
    ("composition", "plus", "ip_plus_composition.safetensors"),
    ("subject", "standard", "general-base.safetensors"),
    ("subject", "light", "base_light.safetensors"),
]


@pytest.mark.parametrize(("use_for", "likeness", "expected"), NAMED)
def test_names_decide_among_files_of_the_same_shapes(pack, world, shelf, image, use_for, likeness, expected):
    for name in ("a plus-face", "general", "ip_plus_composition"):
        shelf(f"{name.removeprefix('a ')}.safetensors", "plus")
    for name in ("general-base", "base_light"):
        shelf(f"{name}.safetensors", "base")
    said = text_of(pack.ImagePrompt.execute(world.model, image, use_for=use_for, likeness=likeness))
    assert said.startswith(expected)
    assert ("Its name decided" in said) is (likeness == "plus")


def test_the_names_of_folders_say_nothing(pack, world, shelf, image):
    """Everything of huggingface/ would be for faces."""
    for name in ("huggingface/plus-face", "huggingface/plus", "highlight/plus"):
        shelf(f"{name}.safetensors", "plus")
    assert text_of(pack.ImagePrompt.execute(world.model, image)).startswith("highlight/plus.safetensors")
    said = text_of(pack.ImagePrompt.execute(world.model, image, use_for="face"))
    assert said.startswith("huggingface/plus-face.safetensors")


def test_a_name_never_wins_over_the_shapes(pack, world, shelf, image):
    shelf("plus-face.safetensors", "plus", world.new_model(width=64))
    shelf("general.safetensors", "plus")
    said = text_of(pack.ImagePrompt.execute(world.model, image, use_for="face"))
    assert said.startswith("general.safetensors") and "No file here has face in its name" in said


@pytest.mark.parametrize(
    ("use_for", "name", "weight_type"),
    [
        ("subject", "a", "linear"),
        ("face", "a", "linear"),
        ("style", "a", "style transfer"),
        ("composition", "a", "composition"),
        ("composition", "ip_plus_composition", "linear"),  # it was trained on composition alone
    ],
)
def test_what_a_use_does(pack, world, shelf, image, use_for, name, weight_type):
    shelf(f"{name}.safetensors", "plus")
    output = pack.ImagePrompt.execute(world.model, image, 0.9, use_for)
    expected = by_hand(pack, world, f"{name}.safetensors", image, weight=0.9, weight_type=weight_type)
    torch.testing.assert_close(world.sample(output.args[0]), world.sample(expected), atol=0, rtol=0)
    assert f"weight type '{weight_type}'." in text_of(output)


SD2 = {"context_dim": 96, "use_linear_in_transformer": True}
PRUNED = {
    "SSD-1B": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1,
        "use_linear_in_transformer": True,
    },
    "BK-SDM small": {
        "num_res_blocks": [1] * 4,
        "transformer_depth": [1, 1, 1, 0],
        "transformer_depth_output": [1] * 6 + [0] * 2,
        "transformer_depth_middle": -2,
    },
}


@pytest.mark.parametrize("layout", [*PRUNED, "SD2"])
def test_sd2_and_pruned_models(pack, world, shelf, image, layout):
    model = world.new_model(**(SD2 if layout == "SD2" else PRUNED[layout]))
    shelf("a.safetensors", "plus", model)
    text = world.conds(SD2["context_dim"]) if layout == "SD2" else (None, None)
    for use_for, weight_type in (("subject", "linear"), ("style", "style transfer"), ("composition", "composition")):
        if layout in PRUNED and use_for != "subject":
            with pytest.raises(pack.core.AdapterError, match=rf"use_for '{use_for}'.*Set use_for to 'subject'"):
                pack.ImagePrompt.execute(model, image, use_for=use_for)
            continue
        found = pack.ImagePrompt.execute(model, image, 0.8, use_for).args[0]
        expected = by_hand(pack, world, "a.safetensors", image, model, weight=0.8, weight_type=weight_type)
        ours, theirs = (world.sample(each, positive=text[0], negative=text[1]) for each in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_another_weight_reads_nothing_and_encodes_nothing(pack, world, shelf, image, monkeypatch):
    import comfy.clip_vision

    shelf("a.safetensors", "plus")
    calls = []
    for owner, name in ((comfy.clip_vision, "load"), (pack.files, "read_checkpoint"), (pack.load, "read_checkpoint")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda path, real=real, name=name: calls.append(name) or real(path))
    model = world.new_model()
    first = pack.ImagePrompt.execute(model, image, 0.7).args[0]
    assert calls == ["read_checkpoint", "load", "read_checkpoint"]  # the header, the encoder, the weights
    owner = type(next(encoder for _, encoder in pack.easy._loaded[model.model].values()))
    encode = owner.encode_image
    monkeypatch.setattr(owner, "encode_image", lambda self, *a, **k: calls.append("encode") or encode(self, *a, **k))
    second = pack.ImagePrompt.execute(model, image, 0.3, "style").args[0]
    assert len(calls) == 3
    assert not torch.equal(world.sample(first), world.sample(second))
    other = pack.ImagePrompt.execute(model, image.flip(1), 0.7).args[0]
    assert calls[3:] == ["encode"]
    assert not torch.equal(world.sample(first), world.sample(other))
    kept = len(pack.easy._loaded)
    del model, first, second, other
    gc.collect()
    assert len(pack.easy._loaded) == kept - 1  # goes with the model


def test_a_replaced_file_is_read_again(pack, world, folders, shelf, image):
    shelf("a.safetensors", "plus", seed=1)
    before, first = pack.ImagePrompt.fingerprint_inputs(model=None), pack.ImagePrompt.execute(world.model, image)
    (folders["ipadapter"] / "a.safetensors").unlink()
    shelf("a.safetensors", "plus", seed=2)
    assert pack.ImagePrompt.fingerprint_inputs(model=None) != before
    second = pack.ImagePrompt.execute(world.model, image)
    assert not torch.equal(world.sample(first.args[0]), world.sample(second.args[0]))


def refused(pack, call, *words):
    with pytest.raises(pack.core.AdapterError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


FAMILY_FILES = [
    ("sd15", "subject", "plus", "ip-adapter-plus_sd15.safetensors"),
    ("sd15", "subject", "standard", "ip-adapter_sd15.safetensors"),
    ("sd15", "face", "plus", "ip-adapter-plus-face_sd15.safetensors"),
    ("sdxl", "subject", "light", "ip-adapter_sdxl_vit-h.safetensors"),
    ("sdxl", "style", "plus", "ip-adapter-plus_sdxl_vit-h.safetensors"),
    ("kolors", "style", "plus", "ip_adapter_plus_general.bin"),
]


@pytest.mark.parametrize(("family", "use_for", "likeness", "file"), FAMILY_FILES)
def test_a_missing_adapter_is_named(pack, world, folders, shelf, family, use_for, likeness, file):
    """The widths of the published models decide, not the tiny ones of these tests."""
    shelf("other.safetensors")
    context, widths = pack.core.FAMILIES["sdxl" if family == "kolors" else family]
    sites = [pack.core.Site(2 * i + 1, str(i), width, context, i) for i, width in enumerate(widths)]
    unet = torch.nn.Module()
    if family == "kolors":  # as the packs that load it do
        unet.encoder_hid_proj = torch.nn.Linear(4096, 2048)
    name = {**pack.core.FAMILY_NAMES, "kolors": "Kolors"}[family]
    refused(
        pack,
        lambda: pack.pairs.find_pair(unet, sites, use_for, likeness),
        f"No adapter for {name} is in {folders['ipadapter']}",
        file,
        "huggingface.co/Kwai-Kolors" if family == "kolors" else "huggingface.co/h94/IP-Adapter",
        "other.safetensors (base for a model of context 64)",
    )


def write_face(pack, folder, name, sites):
    """A FaceID adapter for these layers, with no memory for its weights but on disk."""
    spec = pack.core.new_spec("faceid", [site.dim for site in sites], sites[0].cross_attention_dim, lora_rank=4)
    pack.core.save_adapter(folder / name, pack.core.IPAdapter(spec).half())
    import folder_paths

    folder_paths.filename_list_cache.clear()


def test_a_faceid_adapter_alone_is_named_with_its_nodes(pack, world, folders, image):
    """For a face, and where it fits; Image Prompt runs no face models."""
    sites = pack.core.cross_attention_sites(world.model.model.diffusion_model)
    write_face(pack, folders["ipadapter"], "faceid.safetensors", sites)
    other = pack.core.cross_attention_sites(world.new_model(width=64).model.diffusion_model)
    write_face(pack, folders["ipadapter"], "another.safetensors", other)
    nodes = "with other nodes: Load IP Adapter, Load Face Analysis, Encode Face Prompt and Apply IP Adapter."
    words = f"Or use faceid.safetensors, which needs face models, {nodes}"
    refused(pack, lambda: pack.ImagePrompt.execute(world.model, image, use_for="face"), words)
    with pytest.raises(pack.core.AdapterError) as error:
        pack.ImagePrompt.execute(world.model, image)
    assert "Or use" not in str(error.value) and "faceid.safetensors (faceid for" in str(error.value)


def test_a_faceid_adapter_beside_a_general_one_is_noted(pack, world, folders, shelf, image):
    shelf("general.safetensors", "plus")
    note = "faceid.safetensors keeps a face better, but needs face models: Load IP Adapter, Load Face Analysis"
    assert note not in text_of(pack.ImagePrompt.execute(world.model, image, use_for="face"))
    sites = pack.core.cross_attention_sites(world.model.model.diffusion_model)
    write_face(pack, folders["ipadapter"], "faceid.safetensors", sites)
    said = text_of(pack.ImagePrompt.execute(world.model, image, use_for="face"))
    assert said.startswith("general.safetensors") and note in said
    assert note not in text_of(pack.ImagePrompt.execute(world.model, image))
    shelf("plus-face.safetensors", "plus")
    said = text_of(pack.ImagePrompt.execute(world.model, image, use_for="face"))
    assert said.startswith("plus-face.safetensors") and note not in said


def test_a_model_for_which_nothing_is_published(pack, world, folders, image):
    refused(
        pack,
        lambda: pack.ImagePrompt.execute(world.model, image),
        str(folders["ipadapter"]),
        "context 64",
        "none for it is published",
    )


def test_a_missing_encoder_is_named(pack, world, folders, shelf, image):
    shelf("a.safetensors", "plus")
    import folder_paths

    (folders["clip_vision"] / "named after nothing.safetensors").unlink()
    folder_paths.filename_list_cache.clear()
    refused(
        pack,
        lambda: pack.ImagePrompt.execute(world.model, image),
        "No image encoder for a.safetensors",
        "hidden states of 48",
        str(folders["clip_vision"]),
    )


def test_an_adapter_whose_encoder_is_there_comes_before_a_better_one(pack, world, folders, shelf, image):
    shelf("usable.safetensors", "base")
    sites = pack.core.cross_attention_sites(world.model.model.diffusion_model)
    spec = pack.core.new_spec("plus", [site.dim for site in sites], 64, dim_head=16, depth=1)  # ViT-H's 1280
    pack.core.save_adapter(folders["ipadapter"] / "better.safetensors", pack.core.IPAdapter(spec))
    import folder_paths

    folder_paths.filename_list_cache.clear()
    said = text_of(pack.ImagePrompt.execute(world.model, image))
    assert said.startswith("usable.safetensors")
    assert f"better.safetensors fits better, but its image encoder is not in {folders['clip_vision']}" in said


def test_the_demo_model_needs_no_file(pack, folders):
    if not (pack.assets.emoji_folder() / pack.demo.ADAPTER).is_file():
        pytest.skip("assets/emoji holds no adapter")
    model = pack.LoadIPAdapterDemo.execute().args[0]
    image = pack.DemoImage.execute("crab_twemoji").args[0]
    output = pack.ImagePrompt.execute(model, image)
    assert text_of(output).startswith("the emoji adapter with its own image encoder, weight type 'linear'.")


def test_an_adapter_of_ones_own_for_the_demo_model(pack, world, folders):
    """It is paired with the encoder of the demo when models/clip_vision holds none for it; the node names both."""
    import folder_paths

    if not (pack.assets.emoji_folder() / pack.demo.ADAPTER).is_file():
        pytest.skip("assets/emoji holds no adapter")
    model, clip, _, clip_vision, bundled = pack.LoadIPAdapterDemo.execute().args
    text = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("rocket", "")]
    image = pack.DemoImage.execute("crab_twemoji").args[0]

    def draw(patched):
        return world.sample(patched, size=(8, 8), positive=text[0], negative=text[1])

    def write(name, spec):
        own = pack.core.IPAdapter(spec)
        world.randomise(own, seed=8)
        pack.core.save_adapter(folders["ipadapter"] / name, own)
        folder_paths.filename_list_cache.clear()

    widths, context = bundled.spec.layer_dims, bundled.spec.cross_attention_dim
    write("other encoder.safetensors", pack.core.new_spec("base", widths, context, image_dim=1024))
    output = pack.ImagePrompt.execute(model, image)
    assert text_of(output).startswith("the emoji adapter with its own image encoder, weight type 'linear'. The image")
    assert f"encoder of other encoder.safetensors is not in {folders['clip_vision']}." in text_of(output)
    write("own.safetensors", bundled.spec)
    output = pack.ImagePrompt.execute(model, image)
    kind = f"own.safetensors ({bundled.spec.kind} adapter for "
    assert text_of(output).startswith(kind) and "with the image encoder of the demo, weight" in text_of(output)
    own = pack.LoadIPAdapterDemo.execute("own.safetensors").args[4]
    prompt = pack.EncodeImagePrompt.execute(own, clip_vision, image).args[0]
    expected = draw(world.apply(model, own, prompt, weight=0.7))
    torch.testing.assert_close(draw(output.args[0]), expected, atol=0, rtol=0)
    prompt = pack.EncodeImagePrompt.execute(bundled, clip_vision, image).args[0]
    assert not torch.allclose(expected, draw(world.apply(model, bundled, prompt, weight=0.7)), atol=1e-2)


def test_it_is_essential_where_comfyui_knows_it(pack):
    schema = pack.ImagePrompt.define_schema()
    assert getattr(schema, "essentials_category", "Image Generation") == "Image Generation"
    assert next(item for item in schema.inputs if item.id == "weight").default == 0.7
