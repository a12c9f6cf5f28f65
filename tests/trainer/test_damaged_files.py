"""Every file that the commands open, damaged in every way that is met: one line that names it, and exit status 2."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_core import save_adapter
from ipadapter_core.assets import emoji_folder
from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import BaseModelError
from ipadapter_trainer.models.base_model import load_base_model
from tools.emoji.judges import read_judges

from .conftest import draw_image
from .ldm import write_single_file
from .tiny_models import adapter_of

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438167540\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
UNET, MODEL = "diffusion_pytorch_model", "model"


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def other_model(file: Path) -> bytes:
    """A file of the same suffix from another model."""
    if file.suffix == ".json":
        kind = {"_class_name": "ControlNetModel", "model_type": "bert", "vocab": 1}
        return json.dumps(kind).encode()
    target = file.with_name("other" + file.suffix)
    tensors = {"encoder.conv_in.weight": torch.ones(3, 4), "decoder.conv_in.weight": torch.ones(3, 4)}
    if file.parent.name == "vae":
        tensors = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 4)}
    save_file(tensors, target) if file.suffix == ".safetensors" else torch.save(tensors, target)
    content = target.read_bytes()
    target.unlink()
    return content


# The new content of a file, and what the message says.
DAMAGES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "lfs pointer": (lambda file: LFS, r"a Git LFS pointer, not the file itself; expected .*Download it again"),
    "web page": (lambda file: PAGE, r"a web page, not the file itself; expected .*Download it again"),
    "server's answer": (lambda file: b"Entry not found", r"'Entry not found'.*Download it again|damaged JSON"),
    "empty": (lambda file: b"", r"an empty file \(0 bytes\); expected .*Download it again"),
    "cut off": (lambda file: file.read_bytes()[: file.stat().st_size // 2], "truncated|damaged"),
    "a zero tail": (
        lambda file: file.read_bytes()[: file.stat().st_size // 2].ljust(file.stat().st_size, b"\0"),
        r"values of the tensor \S+ are zero|damaged",
    ),
    "all zeros": (lambda file: bytes(file.stat().st_size), "zero bytes.*Download it again|damaged"),
    "another model": (
        other_model,
        r"looks like a (VAE|text encoder)|config of ControlNetModel|type 'bert'|of bert;",
    ),
    "code": (lambda file: pickle.dumps(Payload()), "nothing was executed|damaged|PyTorch file"),
    "broken json": (lambda file: b'{"a": 1,', "a JSON file|damaged JSON|damaged"),
}
PARTS = (
    f"unet/{UNET}.safetensors",
    f"unet/{UNET}.bin",
    f"vae/{UNET}.safetensors",
    f"text_encoder/{MODEL}.safetensors",
    f"text_encoder_2/{MODEL}.safetensors",
    f"image_encoder/{MODEL}.safetensors",
    "image_encoder/pytorch_model.bin",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "image_encoder/config.json",
    "image_encoder/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "tokenizer_2/merges.txt",
)
# What cannot be wrong: a damage that leaves a file of this kind as good as it was.
HARMLESS = {
    ("model_index.json", "another model"),
    ("tokenizer/tokenizer_config.json", "another model"),
    ("image_encoder/preprocessor_config.json", "another model"),
}


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stderr


def refused(file: Path, words: str, *arguments: str | Path) -> str:
    """The message: one line, which names the file or the folder that it is in."""
    code, stderr = run(*arguments)
    assert code == 2, stderr
    (line,) = stderr.strip().splitlines()
    assert line.startswith("ipadapter: ")
    assert str(file) in line or f"{file.parent}: " in line
    assert re.search(words, line), line
    assert len(line) < 600 + 2 * len(str(file))
    return line


@pytest.fixture(scope="module")
def whole(small_folders: dict[str, Path], clip_folder: Path, tmp_path_factory: Any) -> Path:
    """A small SDXL model with both kinds of weight files and of tokenizers, an adapter, an image, a measuring CLIP."""
    folder = tmp_path_factory.mktemp("whole")
    sdxl_folder, sdxl_model = small_folders["sdxl"], load_base_model(small_folders["sdxl"])
    model = Path(shutil.copytree(sdxl_folder, folder / "model"))
    for part, name in (("unet", UNET), ("image_encoder", "pytorch_model")):
        file = next((model / part).glob("*.safetensors"))
        torch.save(load_file(file), model / part / f"{name}.bin")
    sdxl_model.image_processor.save_pretrained(model / "image_encoder")
    # As the published tokenizers are, which have no tokenizer.json.
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(model / "tokenizer" / name, model / "tokenizer_2" / name)
    shutil.copytree(clip_folder, folder / "clip")
    save_adapter(folder / "adapter.safetensors", adapter_of(sdxl_model, "base"))
    write_single_file(sdxl_folder, folder / "single.safetensors", "sdxl")
    draw_image("red").save(folder / "red.png")
    (folder / "red.txt").write_text("a red square")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same files, by hard links: a damaged one must be a new file."""
    return Path(shutil.copytree(whole, tmp_path / "copy", copy_function=os.link))


def damage(file: Path, how: str) -> str:
    change, words = DAMAGES[how]
    content = change(file)
    file.unlink()
    file.write_bytes(content)
    return words


def generate(copy: Path, **changes: Path) -> list[str | Path]:
    settings = {
        "base_model": copy / "model",
        "adapter": copy / "adapter.safetensors",
        "image": copy / "red.png",
        "output": copy / "out.png",
        **changes,
    }
    return ["generate", *(f"{key}={value}" for key, value in settings.items()), "num_inference_steps=1", "size=64"]


def test_the_whole_model_works(copy: Path) -> None:
    assert run(*generate(copy)) == (0, "")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_of_the_base_model(copy: Path, part: str, how: str) -> None:
    if (part, how) in HARMLESS:
        pytest.skip("such a file is still one")
    file = copy / "model" / part
    if file.suffix == ".bin":  # it is read where there is no other
        next(file.parent.glob("*.safetensors")).unlink()
    words = damage(file, how)
    if file.name == "merges.txt":
        words += r"|damaged: it has \d+ merges, vocab.json needs \d+"
    if file.parent.name.startswith("tokenizer") and how == "another model":
        words += "|cannot be read as CLIPTokenizer.*Download it again"
    if file.suffix == ".bin":
        words += "|truncated or not a PyTorch file"
    refused(file, words, *generate(copy))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_single_file(copy: Path, how: str) -> None:
    file = copy / "single.safetensors"
    refused(file, damage(file, how), *generate(copy, base_model=file, base_config=copy / "model"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_adapter(copy: Path, how: str) -> None:
    file = copy / "adapter.safetensors"
    refused(file, damage(file, how), *generate(copy))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_image_encoder_that_is_named(copy: Path, how: str) -> None:
    """As a file alone, under any suffix."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = copy / "model" / "image_encoder" / name
        words = damage(file, how) + "|32 wide|truncated"
        refused(file, words, *generate(copy, image_encoder=file))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "tokenizer.json", "merges.txt"])
def test_a_damaged_measuring_clip(copy: Path, name: str, how: str) -> None:
    file = copy / "clip" / name
    if name in ("merges.txt", "vocab.json"):
        (copy / "clip" / "tokenizer.json").unlink()
    words = damage(file, how)
    if name == "merges.txt":
        words += r"|damaged: it has \d+ merges, vocab.json needs \d+"
    elif how == "another model":
        words += "|holds a 'bert'|cannot be read as CLIPTokenizer"
    arguments = (f"base_model={copy / 'model'}", f"adapter={copy / 'adapter.safetensors'}", f"data={copy}")
    refused(file, words, "eval", *arguments, f"clip={copy / 'clip'}", f"output={copy / 'evaluation'}")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_judges(tmp_path: Path, how: str) -> None:
    file = tmp_path / "judges.safetensors"
    shutil.copy(emoji_folder() / file.name, file)
    assert read_judges(file)
    words = damage(file, how)
    with pytest.raises(BaseModelError, match=words) as caught:
        read_judges(file)
    assert str(file) in str(caught.value)


def test_nan_in_a_part_is_named(copy: Path) -> None:
    for part, key in (("unet", "conv_in.bias"), ("image_encoder", "visual_projection.weight"), ("vae", "conv_in.bias")):
        file = next((copy / "model" / part).glob("*.safetensors"))
        state = load_file(file)
        name = next(name for name in state if name.endswith(key))
        state[name] = state[name].index_fill(0, torch.tensor(1), float("nan"))
        file.unlink()
        save_file(state, file, metadata={"format": "pt"})
        refused(file, rf"the tensor {name} holds NaN or infinity", *generate(copy))
        save_file({k: t.nan_to_num(0) for k, t in state.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("content", ["{}", "[]", '{"model_type": 5}', "null"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder", "scheduler"])
def test_a_config_that_says_nothing_is_not_filled_in_with_defaults(copy: Path, part: str, content: str) -> None:
    (file,) = (file for file in (copy / "model" / part).glob("*config.json") if "preprocessor" not in file.name)
    file.unlink()
    file.write_text(content)
    refused(file, "no JSON object|no class|of the type|of 5; expected|make states of", *generate(copy))


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("scheduler/scheduler_config.json", "beta_start", "x", "no noise schedule"),
        ("scheduler/scheduler_config.json", "prediction_type", 5, "prediction type 5"),
        ("tokenizer/tokenizer_config.json", "model_max_length", "x", "model_max_length is 'x', expected a number"),
        ("text_encoder/config.json", "vocab_size", None, "vocab_size"),
        ("text_encoder/config.json", "vocab_size", 20, r"a tokenizer of \d+ tokens; the text encoder has 20"),
        ("image_encoder/config.json", "num_hidden_layers", "x", "num_hidden_layers"),
        ("image_encoder/config.json", "hidden_size", 48, "has .* tensors of other shapes than those that its config"),
        ("image_encoder/config.json", "num_hidden_layers", 3, r"lacks \d+ of the tensors that its config names"),
        ("vae/config.json", "block_out_channels", [8, 8, 8, 16], "expected shape"),
    ],
)
def test_a_config_of_other_values_is_named(copy: Path, part: str, key: str, value: Any, words: str) -> None:
    file = copy / "model" / part
    content = json.loads(file.read_text()) | {key: value}
    file.unlink()
    file.write_text(json.dumps(content))
    code, stderr = run(*generate(copy))
    (line,) = stderr.strip().splitlines()
    assert code == 2
    assert str(copy / "model") in line
    assert re.search(words, line), line


def test_no_code_ran() -> None:
    assert not Path("ran").exists()


def test_another_model_as_image_encoder_is_named_by_its_config(copy: Path) -> None:
    models = Path(shutil.copytree(copy / "model", copy / "other models"))
    cases = {
        models / "unet": "its config.json is of UNet2DConditionModel; expected an image encoder",
        models / "vae": "its config.json is of AutoencoderKL; expected an image encoder",
        models / "text_encoder": "its config.json is of clip_text_model; expected an image encoder",
        models: r"no config.json in it; expected the folder of an image encoder. Use .+/other models/image_encoder",
        models / "tokenizer": "no config.json in it.*h94/IP-Adapter",
        models / "vae" / f"{UNET}.safetensors": "looks like a VAE, not an image encoder",
        copy / "adapter.safetensors": "looks like an IP-Adapter, not an image encoder",
    }
    for name in ("unet", "text_encoder"):  # before anything is loaded
        damage(next((models / name).glob("*.safetensors")), "empty")
    for path, words in cases.items():
        refused(path, words, *generate(copy, image_encoder=path))


def test_a_whole_clip_is_an_image_encoder_too(copy: Path) -> None:
    """Its vision half is read, as of openai/clip-vit-large-patch14."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(copy / "clip")
    model = load_base_model(copy / "model", image_encoder=copy / "clip")
    pixels = torch.randn(1, 3, clip.config.vision_config.image_size, clip.config.vision_config.image_size)
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        torch.testing.assert_close(model.image_encoder(pixels).image_embeds, expected)
    edit = json.loads((copy / "clip" / "config.json").read_text())
    edit["vision_config"]["projection_dim"] = 7  # older configs disagree with themselves; the outer one counts
    (copy / "clip" / "config.json").unlink()
    (copy / "clip" / "config.json").write_text(json.dumps(edit))
    assert load_base_model(copy / "model", image_encoder=copy / "clip").image_dim == clip.config.projection_dim
