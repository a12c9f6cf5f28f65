"""`ipadapter generate` as a user types it, and the files it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import DataError, TrainerError
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.pictures import adapter_to_use, open_face, parse_size
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_core import save_adapter

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
    sdxl_folder: Path, sdxl_model: BaseModel, pictures: Path, face: Path, tmp_path: Path
) -> None:
    base = write_single_file(sdxl_folder, tmp_path / "xl.safetensors", "sdxl")
    for kind, prompt in (
        ("faceid-plusv2", ["--image", pictures / "red.png", "--face-embed", face]),
        ("portrait", ["--face-embed", face]),
        ("plus", ["--image", pictures / "red.png"]),
    ):
        save_adapter(tmp_path / "a.safetensors", adapter_of(sdxl_model, kind))
        output = tmp_path / f"{kind}.png"
        code, out, err = ipadapter(
            *("--base-model", base, "--base-config", sdxl_folder, "--adapter", tmp_path / "a.safetensors", *prompt),
            *("--size", "72x64", "--steps", "1", "--output", output),
        )
        assert (code, out.strip()) == (0, f"Saved {output}"), err
        assert Image.open(output).size == (72, 64)


def test_the_command_says_what_a_kind_takes(
    base_model: BaseModel, model_folder: Path, pictures: Path, face: Path, tmp_path: Path
) -> None:
    files = {}
    for kind in ("base", "faceid", "faceid-plus"):
        files[kind] = tmp_path / f"{kind}.safetensors"
        save_adapter(files[kind], adapter_of(base_model, kind))
    image, embed = ["--image", pictures / "red.png"], ["--face-embed", face]
    cases: list[tuple[list[Any], str]] = [
        (["--adapter", files["faceid"], *image, *embed], "This faceid adapter takes no picture; leave --image out"),
        (["--adapter", files["faceid"]], "needs a face embedding (InsightFace ArcFace (normed_embedding, 512))"),
        (["--adapter", files["faceid-plus"], *image], "--face-embed is missing"),
        (["--adapter", files["faceid-plus"], *embed], "--image is missing"),
        (["--adapter", files["base"], *image, *embed], "takes no face embedding"),
        (embed, "--face-embed was given, --adapter is missing"),
        (["--adapter", files["faceid"], "--face-embed", "/nowhere.npy"], "/nowhere.npy: no such face embedding"),
        (["--adapter", files["faceid"], *embed, "--shortcut"], "shortcut=True is for faceid-plus adapters"),
        (["--size", "64by64"], "WIDTHxHEIGHT"),
        (["--prediction-type", "v"], "'v'; expected epsilon or v_prediction"),
        (["--image-encoder", "/nowhere"], "/nowhere: no image encoder there"),
    ]
    for arguments, words in cases:
        code, _, err = ipadapter("--base-model", model_folder, "--output", tmp_path / "o.png", *arguments)
        assert (code, "Traceback" in err) == (2, False)
        assert words in err


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("832x1216") == (1216, 832)
    for text in ("", "x", "512x", "5.5", "1x2x3"):
        with pytest.raises(TrainerError, match="WIDTHxHEIGHT"):
            parse_size(text)


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
        ("broken.safetensors", "cannot be read as a face embedding"),
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
    with pytest.raises(TrainerError, match=r"v1 or v2\?.*--shortcut for v2"):
        adapter_to_use(tmp_path / "x.safetensors")
