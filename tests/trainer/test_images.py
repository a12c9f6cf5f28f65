"""`ipadapter generate` as a user types it, and the files it reads."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_core import save_adapter
from ipadapter_core.assets import emoji_folder
from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import DataError, TrainerError
from ipadapter_trainer.evaluation.generate_images import open_face
from ipadapter_trainer.files.opening import adapter_to_use
from ipadapter_trainer.models.base_model import BaseModel

from .ldm import write_single_file
from .tiny_models import adapter_of


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def face(tmp_path: Path) -> Path:
    np.save(tmp_path / "face.npy", np.linspace(-1, 1, 512, dtype=np.float32))
    return tmp_path / "face.npy"


def test_the_command_draws_with_a_face_and_a_single_file(
    sdxl_folder: Path, sdxl_model: BaseModel, images: Path, face: Path, tmp_path: Path
) -> None:
    base = write_single_file(sdxl_folder, tmp_path / "xl.safetensors", "sdxl")
    for kind, prompt in (
        ("faceid-plusv2", [f"image={images / 'red.png'}", f"face_embeds={face}"]),
        ("portrait", [f"face_embeds={face}"]),
        ("plus", [f"image={images / 'red.png'}"]),
    ):
        save_adapter(tmp_path / "a.safetensors", adapter_of(sdxl_model, kind))
        output = tmp_path / f"{kind}.png"
        code, out, err = ipadapter(
            *(f"base_model={base}", f"base_config={sdxl_folder}", f"adapter={tmp_path / 'a.safetensors'}", *prompt),
            *("size=72x64", "num_inference_steps=1", f"output={output}"),
        )
        assert (code, out.strip()) == (0, f"Saved {output}"), err
        assert Image.open(output).size == (72, 64)


def test_the_command_says_what_a_kind_takes(
    base_model: BaseModel, model_folder: Path, images: Path, face: Path, tmp_path: Path
) -> None:
    files = {}
    for kind in ("base", "faceid", "faceid-plus"):
        files[kind] = tmp_path / f"{kind}.safetensors"
        save_adapter(files[kind], adapter_of(base_model, kind))
    image, embed = f"image={images / 'red.png'}", f"face_embeds={face}"
    base, faceid, plus = (f"adapter={files[kind]}" for kind in ("base", "faceid", "faceid-plus"))
    cases: list[tuple[list[str], str]] = [
        ([faceid, image, embed], "This faceid adapter takes no image; leave image out"),
        ([faceid], "needs a face embedding (InsightFace ArcFace (normed_embedding, 512))"),
        ([plus, image], "face_embeds is missing"),
        ([plus, embed], "image is missing"),
        ([base, image, embed], "takes no face embedding; leave face_embeds out"),
        ([embed], "face_embeds is set, adapter is missing"),
        ([faceid, "face_embeds=/nowhere.npy"], "/nowhere.npy: no such face embedding"),
        ([faceid, embed, "shortcut=true"], "shortcut=True is for faceid-plus adapters"),
        (["size=64by64"], "WIDTHxHEIGHT"),
        (["prediction_type=v"], "'v': expected 'epsilon' or 'v_prediction'"),
        (["image_encoder=/nowhere"], "/nowhere: no image encoder there"),
    ]
    for arguments, words in cases:
        code, _, err = ipadapter(f"base_model={model_folder}", f"output={tmp_path / 'o.png'}", *arguments)
        assert (code, "Traceback" in err) == (2, False)
        assert words in err


def test_a_face_embedding_comes_from_an_array_or_a_tensor(base_model: BaseModel, tmp_path: Path) -> None:
    spec = adapter_of(base_model, "faceid").spec
    face = torch.randn(512)
    np.save(tmp_path / "a.npy", face.numpy())
    save_file({"embed": face[None]}, str(tmp_path / "b.safetensors"))
    for name in ("a.npy", "b.safetensors"):
        assert torch.equal(open_face(tmp_path / name, spec), face[None])
    save_file({"a": face, "b": face + 1}, str(tmp_path / "two.safetensors"))
    save_file({"a": face[:500]}, str(tmp_path / "short.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    for name, words in (
        ("two.safetensors", "holds 2 tensors; expected one"),
        ("short.safetensors", "512 values"),
        ("broken.safetensors", "begins with '12345678'; expected a face embedding. Download or make it again"),
        ("none.npy", "no such face embedding"),
        ("x.txt", "no such face embedding"),
    ):
        with pytest.raises(DataError, match=words):
            open_face(tmp_path / name, spec)


def test_the_version_of_faceid_plus_comes_from_the_option_the_file_or_its_name(
    base_model: BaseModel, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "says.safetensors", adapter_of(base_model, "faceid-plusv2"))
    silent = load_file(tmp_path / "says.safetensors")
    for name in ("x.safetensors", "ip-adapter-faceid-plusv2_sd15.safetensors"):
        save_file(silent, str(tmp_path / name), metadata={"ipadapter.dim_head": "32"})
    assert adapter_to_use(tmp_path / "says.safetensors").spec.shortcut is True
    assert adapter_to_use(tmp_path / "ip-adapter-faceid-plusv2_sd15.safetensors").spec.shortcut is True
    assert adapter_to_use(tmp_path / "x.safetensors", shortcut=False).spec.shortcut is False
    with pytest.raises(TrainerError, match=r"v1 or v2\?.*shortcut=true for v2"):
        adapter_to_use(tmp_path / "x.safetensors")


def bomb(file: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in few bytes, of which the header alone is there."""
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    file.write_bytes(data)


def without_pixels(file: Path) -> None:
    file.write_bytes(b"\x00" * 2 + b"\x02" + b"\x00" * 9 + struct.pack("<HHBB", 0, 5, 24, 0))


def cut(file: Path) -> None:
    Image.effect_noise((200, 200), 50).save(file, "PNG")
    file.write_bytes(file.read_bytes()[:2000])


IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a.png": (bomb, "pixels"),
    "a.tga": (without_pixels, "pixels|not an image"),
    "cut.png": (cut, "truncated"),
    "text.png": (lambda file: file.write_text("hello"), "begins with 'hello'; expected JPEG, PNG"),
    "empty.jpg": (lambda file: file.touch(), r"an empty file \(0 bytes\); expected JPEG, PNG"),
    "page.jpg": (
        lambda file: file.write_text("<html>404</html>"),
        "a web page, not the file itself; expected JPEG, PNG",
    ),
    "lfs.webp": (lambda file: file.write_text("version https://git-lfs.github.com"), "a Git LFS pointer.*again"),
    "folder.png": (lambda file: file.mkdir(), "no such image"),
    "model.jpg": (lambda file: save_file({"a": torch.zeros(1)}, file), "a safetensors file; expected JPEG, PNG"),
    "zeros.png": (lambda file: file.write_bytes(bytes(999)), "zero bytes"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_no_image_is_named(
    base_model: BaseModel, model_folder: Path, tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter_of(base_model, "base"))
    write, words = IMAGES[name]
    write(tmp_path / name)
    common = (f"base_model={model_folder}", f"adapter={tmp_path / 'a.safetensors'}", f"output={tmp_path / 'o.png'}")
    code, _, err = ipadapter(*common, f"image={tmp_path / name}")
    (line,) = err.strip().splitlines()
    assert code == 2
    assert line.startswith(f"ipadapter: {tmp_path / name}: ")
    assert re.search(words, line), line
    assert not (tmp_path / "o.png").exists()


def test_numbers_that_generate_nothing_are_refused(
    base_model: BaseModel, model_folder: Path, images: Path, clip_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.safetensors"
    save_adapter(adapter, adapter_of(base_model, "base"))
    generate = ("generate", f"image={images / 'red.png'}", f"output={tmp_path / 'o.png'}")
    evaluate = ("eval", f"data={images}", f"clip={clip_folder}", f"output={tmp_path / 'evaluation'}")
    for setting, words in (
        ("weight=nan", "weights? = '?nan'?: expected a finite number"),
        ("weight=inf", "weights? = '?inf'?: expected a finite number"),
        ("weight=-inf", "weights? = '?-inf'?: expected a finite number"),
        ("weight=1e6", r"weights? = ('1e6'|1000000\.0): expected at most 10"),
        ("weight=-11", r"weights? = ('-11'|-11\.0): expected at least -10"),
        ("guidance_scale=nan", "guidance_scale = 'nan': expected a finite number"),
        ("guidance_scale=inf", "guidance_scale = 'inf': expected a finite number"),
        ("guidance_scale=-3", "guidance_scale = '-3': expected at least 0"),
        ("guidance_scale=101", "guidance_scale = '101': expected at most 100"),
        ("num_inference_steps=1001", "num_inference_steps = '1001': expected at most 1000"),
        ("size=100000", "at most 16384 pixels"),
        (f"seed={2**70}", f"seed is {2**70}; expected a whole number of 64 bits"),
        ("num_images=1001", "num_images = '1001': expected at most 1000"),
    ):
        for command in (generate, evaluate):
            if command is evaluate and setting.startswith(("seed", "num_images")):  # any seed; there is no num_images
                continue
            changed = setting.replace("weight=", "weights=") if command is evaluate else setting
            arguments = (*command, f"base_model={model_folder}", f"adapter={adapter}", changed)
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert result.exit_code == 2, (arguments, result.exception)
            (line,) = result.stderr.strip().splitlines()
            assert re.search(words, line), line
    assert not (tmp_path / "o.png").exists()


def test_a_damaged_face_embedding_is_named(base_model: BaseModel, model_folder: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter_of(base_model, "faceid"))
    face = np.linspace(-1, 1, 512, dtype=np.float32)
    files: dict[str, tuple[Callable[[Path], Any], str]] = {
        "nan.npy": (lambda file: np.save(file, np.where(face > 0, np.nan, face)), "values that are not finite"),
        "short.npy": (lambda file: np.save(file, face[:500]), r"of 512 values, found the shape \(500,\)"),
        "two.npy": (lambda file: np.save(file, np.stack([face, face])), r"found the shape \(2, 512\)"),
        "objects.npy": (lambda file: np.save(file, np.array([{}]), allow_pickle=True), "cannot be read as a face"),
        "cut.npy": (lambda file: file.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'"), "cannot be read as a face"),
        "lfs.npy": (lambda file: file.write_text("version https://git-lfs.github.com"), "a Git LFS pointer.*again"),
        "page.bin": (lambda file: file.write_text("<html>404</html>"), "a web page.*expected a face embedding"),
        "empty.npy": (lambda file: file.touch(), r"an empty file \(0 bytes\)"),
        "nan.safetensors": (lambda file: save_file({"a": torch.full((512,), torch.nan)}, file), "not finite"),
        "cut.safetensors": (lambda file: file.write_bytes(b"\x80\0\0\0\0\0\0\0{"), "cannot be read as a face"),
        "image.npy": (lambda file: Image.new("L", (1, 1)).save(file, "PNG"), "a PNG image; expected a face"),
    }
    common = (f"base_model={model_folder}", f"adapter={tmp_path / 'a.safetensors'}", f"output={tmp_path / 'o.png'}")
    for name, (write, words) in files.items():
        write(tmp_path / name)
        code, _, err = ipadapter(*common, f"face_embeds={tmp_path / name}")
        (line,) = err.strip().splitlines()
        assert code == 2
        assert line.startswith(f"ipadapter: {tmp_path / name}: ")
        assert re.search(words, line), line


def test_the_libraries_print_nothing(model_folder: Path, tmp_path: Path, run_ipadapter: Any) -> None:
    """Neither about torchvision, which is not needed, nor while they load."""
    for arguments in (
        ("generate", f"base_model={model_folder}", f"output={tmp_path / 'o.png'}", "num_inference_steps=1"),
        ("convert", emoji_folder() / "adapter.safetensors", tmp_path / "converted.safetensors"),
        ("demo", "--adapter", "/nowhere.safetensors"),
    ):
        _, err = run_ipadapter(*arguments).communicate(timeout=300)
        assert [line for line in err.splitlines() if not line.startswith("ipadapter: /nowhere")] == []
