"""What the tests of the data set share."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ipadapter_trainer.data.preprocess import Preprocessor
from ipadapter_trainer.models.base_model import BaseModel


def preprocessor_from_config(base_model: BaseModel, **changes: Any) -> Preprocessor:
    values = {
        "tokenizers": base_model.tokenizers,
        "text_length": base_model.text_length,
        "image_processor": base_model.image_processor,
        **changes,
    }
    return Preprocessor(**values)


def encoded_image(image: Image.Image, kind: str = "png") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def sample(number: int, size: tuple[int, int] = (40, 40)) -> dict[str, bytes]:
    """A sample that its colour and its caption tell from others."""
    colour = (number * 5 % 256, 255 - number * 5 % 256, 90)
    return {"png": encoded_image(Image.new("RGB", size, colour)), "txt": f"caption {number}".encode()}


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Two batches, bit for bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
