"""Save Image Prompt and Load Image Prompt, in real folders of ComfyUI; files of ComfyUI_IPAdapter_plus too."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch


@pytest.fixture(autouse=True)
def folders(comfyui, tmp_path, monkeypatch):
    import folder_paths

    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def save(pack):
    def run(prompt, prefix="prompt"):
        """Returns the file."""
        text = pack.SaveImagePrompt.execute(prompt, prefix).ui.as_dict()["text"][0]
        import folder_paths

        return Path(folder_paths.get_output_directory()) / text.removeprefix("output/")

    return run


@pytest.fixture
def load(pack):
    def run(name, **options):
        return pack.LoadImagePrompt.execute(name, **options).args[0]

    return run


@pytest.fixture
def encode(pack, world, encoder):
    def run(seed=1, count=1, adapter=world.adapter, **options):
        image = torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(seed))
        return pack.EncodeImagePrompt.execute(adapter, encoder, image, **options).args[0]

    return run


@pytest.fixture
def plus(world):
    return world.new_adapter(world.model, kind="plus", name="plus")


def names(pack):
    (choices,) = [i for i in pack.LoadImagePrompt.define_schema().inputs if i.id == "image_prompt_name"]
    return list(choices.options)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_there_and_back(pack, world, encode, save, load, plus, kind):
    adapter = world.adapter if kind == "base" else plus
    for number, options in enumerate(({}, {"count": 3, "weight": 0.7, "one_each": True}, {"image_negative": None}), 1):
        if "image_negative" in options:
            options["image_negative"] = torch.rand(2, 32, 32, 3)
        prompt = encode(adapter=adapter, **options)
        assert save(prompt).name == f"prompt_{number:05}_.safetensors"
        loaded = load(f"image_prompts/prompt_{number:05}_.safetensors [output]")
        for field in ("adapter", "one_each", "has_negative", "likeness", "weights"):
            assert getattr(loaded, field) == getattr(prompt, field), field
        assert torch.equal(loaded.positive.image, prompt.positive.image)
        assert (loaded.negative is None) == (prompt.negative is None)
        drawn = [world.sample(world.apply(world.model, adapter, p), batch=3) for p in (prompt, loaded)]
        assert torch.equal(*drawn)
    assert len(names(pack)) == 3


def test_face_prompts(pack, save, load):
    encoded = pack.types.EncodedImages(torch.rand(2, 5, 48), torch.rand(2, 16), (0.5, 1.0))
    prompt = pack.types.ImagePrompt(
        encoded, pack.types.EncodedImages(torch.rand(1, 5, 48), torch.zeros(1, 16)), "face.bin", likeness=0.4
    )
    save(prompt, "faces/anna")
    loaded = load("image_prompts/faces/anna_00001_.safetensors [output]")
    assert torch.equal(loaded.positive.face, encoded.face) and loaded.likeness == 0.4
    assert torch.equal(loaded.negative.face, torch.zeros(1, 16)) and loaded.weights == prompt.weights
    only = dataclasses.replace(prompt, positive=pack.types.EncodedImages(None, torch.rand(1, 16)), negative=None)
    save(only, "faces/bea")
    assert load("image_prompts/faces/bea_00001_.safetensors [output]").positive.image is None


def test_what_a_file_says_of_itself(encode, save):
    path = save(encode())
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("positive.image").shape == (1, 48)
    assert metadata["format"] == "ip_adapter_kit image prompt" and metadata["version"] == "1"
    assert metadata["adapter"] == "a.safetensors" and json.loads(metadata["positive_weights"]) == [1.0]
    assert not list(path.parent.glob("*.tmp")) and path.stat().st_mode & 0o044  # others may read it


def test_calculated_prompts_share_no_memory_in_the_file(pack, encode, save, load):
    """safetensors refuses tensors that do."""
    each = encode(count=2, one_each=True)
    same = dataclasses.replace(each, negative=pack.types.EncodedImages(each.positive.image[:1]))
    save(same)
    loaded = load("image_prompts/prompt_00001_.safetensors [output]")
    assert torch.equal(loaded.negative.image, each.positive.image[:1])


def test_a_loaded_prompt_lives_without_its_file(encode, save, load, world):
    path = save(encode())
    loaded = load("image_prompts/prompt_00001_.safetensors [output]")
    features = loaded.positive.image.clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.positive.image, features)


def test_another_adapter_is_refused_by_name(pack, world, encode, save, load):
    save(encode())
    other = world.new_adapter(world.model, name="b")
    with pytest.raises(pack.core.AdapterError, match=r"encoded with a.safetensors, the connected adapter is b.safe"):
        world.apply(world.model, other, load("image_prompts/prompt_00001_.safetensors [output]"))


def test_another_kind_of_adapter_under_the_same_name_is_refused_by_name(pack, world, folders, encode, save, load, plus):
    for adapter in (world.adapter, plus):
        save(encode(adapter=adapter))
    base = world.new_adapter(world.model, name="plus")
    same = world.new_adapter(world.model, kind="plus", name="a")
    for number, adapter, words in (
        (1, same, "The features have shape (1, 48), this plus adapter takes [B, L, 48]"),
        (2, base, "The features have shape (1, 5, 48), this base adapter takes [B, 48]"),
    ):
        prompt = load(f"image_prompts/prompt_{number:05}_.safetensors [output]")
        with pytest.raises(pack.core.AdapterError) as error:
            world.apply(world.model, adapter, prompt)
        said = f"does not fit {adapter.name}, though it was encoded for a file of that name. {words}"
        assert said in str(error.value) and "encode the images again" in str(error.value), str(error.value)
        old = dataclasses.replace(prompt, adapter=None)
        with pytest.raises(pack.core.AdapterError) as error:
            world.apply(world.model, adapter, old)
        assert f"does not fit {adapter.name}. {words}" in str(error.value), str(error.value)
    encoded = pack.types.EncodedImages(torch.rand(1, 48))
    wrong = dataclasses.replace(encode(adapter=plus), negative=encoded)
    with pytest.raises(pack.core.AdapterError, match=r"does not fit plus\.safetensors"):
        world.apply(world.model, plus, wrong)


def test_adapters_in_subfolders_are_named_as_this_system_does(encode, save, load):
    for saved in ("sd15/a.safetensors", "sd15\\a.safetensors"):
        save(dataclasses.replace(encode(), adapter=saved))
    for number in (1, 2):
        loaded = load(f"image_prompts/prompt_{number:05}_.safetensors [output]")
        assert loaded.adapter == os.path.join("sd15", "a.safetensors")  # noqa: PTH118


def test_the_list(pack, folders, encode, save):
    assert names(pack) == ["none: make one with Save Image Prompt"]
    path = save(encode(), "portraits/anna")
    (folders / "input" / "sub").mkdir()
    for name in ("b.ipadpt", "sub/a.safetensors", "image.png"):
        (folders / "input" / name).write_bytes(path.read_bytes())
    (folders / "output" / "model.safetensors").write_bytes(path.read_bytes())
    want = ["b.ipadpt", "sub/a.safetensors", "image_prompts/portraits/anna_00001_.safetensors [output]"]
    assert names(pack) == want


def test_another_file_of_the_same_name_is_loaded_again(pack, folders, encode, save):
    name = "image_prompts/prompt_00001_.safetensors [output]"
    path = save(encode())
    first = pack.LoadImagePrompt.fingerprint_inputs(name)
    assert first == pack.LoadImagePrompt.fingerprint_inputs(image_prompt_name=name, negative=None)
    path.write_bytes(save(encode(count=2), "other").read_bytes())
    assert pack.LoadImagePrompt.fingerprint_inputs(name) != first
    path.unlink()
    assert pack.LoadImagePrompt.fingerprint_inputs(name) == ""


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        *((name, "leads out of output/image_prompts") for name in ("../up", "a/../../up", "/tmp/up", "..", "a/..")),
        *(
            (name, "leads out of output/image_prompts")
            for name in ("C:up", "C:\\up", "\\\\host\\share\\up", "a\\..\\..\\up")
        ),
        *((name, "names no file") for name in (".", "./", "a/", "a/.")),
        *((f"anna{sign}b", f"holds {sign!r}, which file names cannot") for sign in "\0\n\ud800:?*|"),
        *((name, "which Windows cannot name") for name in ("con", "faces/NUL", "com1.old", "faces./anna", "a /b")),
    ],
)
def test_names_that_are_none(pack, folders, encode, prefix, words):
    with pytest.raises(pack.core.AdapterError) as error:
        pack.SaveImagePrompt.execute(encode(), prefix)
    assert words in str(error.value) and "filename_prefix" in str(error.value), str(error.value)
    str(error.value).encode()  # the server sends it as UTF-8
    assert not list(folders.rglob("*.safetensors"))


def test_names_of_every_kind(pack, encode, save):
    wanted = {
        "": "prompt",
        "./x": "x",
        "a//b": "a/b",
        "a\\c": "a/c",
        ".hidden": ".hidden",
        "Änne 2": "Änne 2",
        "conrad": "conrad",
    }
    for prefix, name in wanted.items():
        for number in (1, 2):  # counted, not overwritten
            path = save(encode(), prefix)
            assert path.as_posix().endswith(f"image_prompts/{name}_{number:05}_.safetensors")
    assert len(names(pack)) == 2 * len(wanted)


def test_too_long_a_name(pack, encode):
    with pytest.raises(pack.core.AdapterError, match=r"not saved .*change filename_prefix"):
        pack.SaveImagePrompt.execute(encode(), "a" * 300)


def test_links_are_followed(pack, folders, encode, save, load):
    """To files and to folders, in both places, as in the model folders; one to a folder above it ends nothing."""
    saved = save(encode())
    elsewhere = folders / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.safetensors").write_bytes(saved.read_bytes())
    for place in (folders / "input", saved.parent):
        (place / "file.safetensors").symlink_to(elsewhere / "far.safetensors")
        (place / "folder").symlink_to(elsewhere)
        (place / "above").symlink_to(place)
        (place / "broken.safetensors").symlink_to(elsewhere / "gone.safetensors")
    want = ["file.safetensors", "folder/far.safetensors"]
    output = [f"image_prompts/{name} [output]" for name in (*want, saved.name)]
    assert names(pack) == want + output
    for name in names(pack):
        assert torch.equal(load(name).positive.image, encode().positive.image)
        assert pack.LoadImagePrompt.fingerprint_inputs(name)
    with pytest.raises(pack.core.AdapterError, match="image_prompts/folder is a link to another place"):
        save(encode(), "folder/new")
    assert [file.name for file in elsewhere.iterdir()] == ["far.safetensors"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "gone.safetensors", "none: make one with Save Image Prompt"])
def test_only_names_of_the_list_are_read(pack, folders, encode, save, load, name):
    (folders / "secret.safetensors").write_bytes(save(encode()).read_bytes())
    with pytest.raises(pack.core.AdapterError, match=r"image_prompt_name is .* Choose one of: image_prompts/prompt_0"):
        load(name)


def test_an_empty_list(pack, folders, load):
    for name in ("none: make one with Save Image Prompt", "deleted.safetensors"):
        with pytest.raises(pack.core.AdapterError, match="There is no image prompt"):
            load(name)


def altered(path, **changes):
    """The file with other metadata; None takes a key away."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in {**file.metadata(), **changes}.items() if v is not None}
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return safetensors.torch.save(tensors, metadata)


def test_damaged_and_foreign_files(pack, folders, encode, save, load):
    path = save(encode(count=2))
    good = path.read_bytes()
    lora = {"lora_unet_down.lora_up.weight": torch.rand(2, 2)}
    cases = {
        "truncated": good[:-40],
        "a web page": b"<!doctype html><html></html>",
        "an empty file": b"",
        "a LoRA; expected a file of Save Image Prompt": safetensors.torch.save(lora),
        "something unknown": safetensors.torch.save({"x": torch.rand(2)}),
        "x.safetensors: format 2 of image prompts; this version": altered(path, version="2"),
        "damaged image prompt (its version is 'two')": altered(path, version="two"),
        "damaged image prompt ('one_each')": altered(path, one_each=None),
        "for 1 images": altered(path, positive_weights="[1.0]"),
        "damaged image prompt (positive has": altered(path, positive_weights="[1.0, NaN]"),
        "damaged image prompt (": altered(path, positive_weights="many"),
    }
    for words, content in cases.items():
        (folders / "input" / "x.safetensors").write_bytes(content)
        with pytest.raises(pack.core.AdapterError) as error:
            load("x.safetensors")
        assert words in str(error.value) and "x.safetensors" in str(error.value), (words, str(error.value))
        assert "ownload" not in str(error.value), str(error.value)  # nobody publishes it


def old_file(folders, name, value, **options):
    """As the old pack writes it."""
    torch.save(value, folders / "input" / name, **options)
    return name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_files(pack, world, folders, encode, load, plus, zipped, dtype):
    options = {"_use_new_zipfile_serialization": zipped}
    base = encode(count=2)
    loaded = load(old_file(folders, "base.ipadpt", base.positive.image.to(dtype), **options))
    assert loaded.adapter is None and loaded.negative is None and loaded.positive.weights == (1.0, 1.0)
    drawn = [world.sample(world.apply(world.model, world.adapter, prompt)) for prompt in (base, loaded)]
    torch.testing.assert_close(*drawn, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=1e-3)
    hidden = encode(adapter=plus, negative="black image")
    one, other = (images.image.to(dtype) for images in (hidden.positive, hidden.negative))
    names = old_file(folders, "pos.ipadpt", one, **options), old_file(folders, "neg.ipadpt", other, **options)
    with pytest.raises(pack.core.AdapterError, match=r"no negative image, and plus.safetensors is a plus adapter"):
        world.apply(world.model, plus, load(names[0]))
    black = encode(adapter=plus, image_negative=torch.zeros(1, 32, 32, 3))
    for negative in (load(names[1]), dataclasses.replace(black, positive=black.negative)):
        prompt = load(names[0], negative=negative)
        drawn = [world.sample(world.apply(world.model, plus, p)) for p in (hidden, prompt)]
        torch.testing.assert_close(*drawn, atol=1e-3 if dtype == torch.float32 else 0.3, rtol=1e-3)
        assert prompt.has_negative


def test_old_files_that_are_none(pack, folders, load, world, plus):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    cases = {
        "could run code; nothing was executed": Evil(),
        "holds one dict; expected the features": {"x": torch.rand(2)},
        "holds a tensor of shape (3,) (float32)": torch.rand(3),
        "holds a tensor of shape (1, 3) (int64)": torch.ones(1, 3, dtype=torch.int64),
        "hold NaN or infinity": torch.full((1, 3), torch.nan),
    }
    for words, value in cases.items():
        with pytest.raises(pack.core.AdapterError) as error:
            load(old_file(folders, "x.ipadpt", value))
        assert words in str(error.value) and "x.ipadpt" in str(error.value), (words, str(error.value))
    (folders / "input" / "x.ipadpt").write_bytes(b"PK\x03\x04" + b"\0" * 99)
    with pytest.raises(pack.core.AdapterError, match=r"truncated or not a PyTorch file.*Copy it again"):
        load("x.ipadpt")
    (folders / "input" / "x.ipadpt").write_bytes(safetensors.torch.save({"x": torch.rand(2)}))
    with pytest.raises(pack.core.AdapterError, match=r"expected the features in an .ipadpt file"):
        load("x.ipadpt")
    wide = load(old_file(folders, "wide.ipadpt", torch.rand(1, 52)))
    with pytest.raises(pack.core.AdapterError, match="52 wide, this base adapter takes 48"):
        world.apply(world.model, world.adapter, wide)


def test_a_negative_for_any_file(pack, world, encode, save, load, plus):
    save(encode(count=2, one_each=True))
    name = "image_prompts/prompt_00001_.safetensors [output]"
    unwanted = encode(5)
    loaded = load(name, negative=unwanted)
    assert loaded.has_negative and torch.equal(loaded.negative.image, unwanted.positive.image)
    for words, negative in (
        ("The file was encoded with a.safetensors, negative with plus.safetensors", encode(adapter=plus)),
        ("features of 48, negative of 5 x 48", dataclasses.replace(encode(adapter=plus), adapter=None)),
        ("There are 2 images, one for each latent, and 3 negative images", encode(6, 3)),
    ):
        with pytest.raises(pack.core.AdapterError) as error:
            load(name, negative=negative)
        assert words in str(error.value), str(error.value)
