"""Tiny random models, saved as real diffusers folders and loaded by the real code."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from ipadapter_core import AdapterSpec, IPAdapter, new_spec
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import make_config
from ipadapter_trainer.training import cost

from ..training_fixtures import fresh_accelerator, one_thread  # noqa: F401 -- used by every test
from .published_bases import write_published_base
from .tiny_models import COLOURS, write_model
from .warm_python import WarmProcess, WarmPython


def draw_image(colour: str, size: tuple[int, int] = (80, 64)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((20, 14, 56, 50), fill=colour)
    return image


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-sd15")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5 with a UNet of few layers."""
    return write_model(tmp_path_factory.mktemp("small") / "tiny-sd15", small=True)


@pytest.fixture(scope="session")
def small_folders(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: models with a UNet of few layers."""
    folder = tmp_path_factory.mktemp("small")
    others = {family: write_model(folder / f"tiny-{family}", family, small=True) for family in ("sd2", "sdxl")}
    return {"sd15": small_folder, **others}


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another context width, linear projections, v-prediction."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-sd2", "sd2")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text encoders, pooled text and time ids; 2 to 4 cross-attention layers in two of its three levels."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-sdxl", "sdxl")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: the shapes of the published base models, without weights."""
    folder = tmp_path_factory.mktemp("published")
    return {family: write_published_base(folder / family, family) for family in ("sd15", "sd2", "sdxl")}


@pytest.fixture(scope="session")
def counts() -> dict[Any, cost.Count]:
    return {}


@pytest.fixture(scope="module")
def shared_counts(counts: dict[Any, cost.Count]) -> Iterator[None]:
    """Kinds with as many tokens share the count of their family's UNet, and all of a family that of its encoders."""
    count_unet, count_encoders = cost.count_unet, cost.count_encoders

    def settings_of(config: TrainConfig) -> tuple[Any, ...]:
        return (
            config.batch_size,
            config.resolution,
            config.mixed_precision,
            config.gradient_checkpointing,
            config.compile,
        )

    def unet_once(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> cost.Count:
        key = ("UNet", base_model.name, spec.num_tokens, spec.lora_rank, *settings_of(config))
        return counts.get(key) or counts.setdefault(key, count_unet(base_model, spec, config))

    def encoders_once(base_model: BaseModel, spec: AdapterSpec, config: TrainConfig) -> cost.Count:
        key = ("encoders", base_model.name, spec.image_dim, *settings_of(config))
        return counts.get(key) or counts.setdefault(key, count_encoders(base_model, spec, config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "count_unet", unet_once)
        patch.setattr(cost, "count_encoders", encoders_once)
        yield


@pytest.fixture(scope="session")
def base_model(model_folder: Path) -> BaseModel:
    return load_base_model(model_folder)


@pytest.fixture(scope="session")
def small_model(small_folder: Path) -> BaseModel:
    return load_base_model(small_folder)


@pytest.fixture(scope="session")
def sd2_model(sd2_folder: Path) -> BaseModel:
    return load_base_model(sd2_folder)


@pytest.fixture(scope="session")
def sdxl_model(sdxl_folder: Path) -> BaseModel:
    return load_base_model(sdxl_folder)


@pytest.fixture(scope="session")
def v_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The same weights with the v target."""
    folder = tmp_path_factory.mktemp("v") / "tiny-v"
    folder.mkdir()
    for part in model_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    config = json.loads((model_folder / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return load_base_model(folder)


def write_images(folder: Path) -> Path:
    """Six images with captions beside them, in a new folder."""
    folder.mkdir()
    for colour in COLOURS:
        draw_image(colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images with captions beside them."""
    return write_images(tmp_path / "images")


def training_settings(base_model: Path, data: Path, output: Path) -> dict[str, Any]:
    """A training of seconds."""
    return {
        "base_model": str(base_model),
        "data": str(data),
        "output": str(output),
        "resolution": 64,
        "batch_size": 2,
        "steps": 6,
        "num_workers": 0,
        "log_every": 1,
        "log_with": "none",
        "learning_rate": 1e-3,
        "export_dtype": "float32",
    }


@pytest.fixture
def settings(images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of the model of few layers, unless the test asks for the whole one too."""
    whole = {"model_folder", "base_model"} & set(request.fixturenames)
    folder = request.getfixturevalue("model_folder" if whole else "small_folder")
    return training_settings(folder, images, tmp_path / "run")


@pytest.fixture
def config(settings: dict[str, Any]) -> TrainConfig:
    return make_config(settings)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random CLIP, as transformers saves it."""
    from tools.emoji.clip import new_clip, train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    new_clip(train_tokenizer([f"a {c} square" for c in COLOURS], folder, size=300), 64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Starts Python processes that need not import anything."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Libraries read them when they are imported. Nobody answers there but the Hub of the tests that serve one.
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "huggingface")}
    python = WarmPython(folder, hub)
    yield python
    python.close()


@pytest.fixture
def run_ipadapter(warm_python: WarmPython) -> Callable[..., WarmProcess]:
    """Start the command as a user would, in a process of its own."""

    def start(*arguments: str | Path) -> WarmProcess:
        # In the background pytest ignores Ctrl-C, and so would what it starts.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        return warm_python.start(f"{code}from ipadapter_trainer.cli import main; main()", arguments)

    return start


# Reduced layouts of the published families: the same layers, narrow. 64 divides each context, as every host's heads do.
ADAPTER_LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "sd15": ((4,) * 2 + (8,) * 2 + (12,) * 5 + (8,) * 3 + (4,) * 3 + (16,), 64),
    "sd2": ((8,) * 2 + (4,) * 2 + (16,) * 5 + (4,) * 3 + (8,) * 3 + (12,), 128),
    "sdxl": ((4,) * 4 + (8,) * 50 + (4,) * 6 + (8,) * 10, 128),
}


@pytest.fixture
def random_adapter() -> Callable[..., IPAdapter]:
    """A frozen adapter of a config's kind in a reduced layout; weights of a trained one's size, all different."""
    from ipadapter_trainer.settings.kinds import TRAIN_KINDS

    def make(kind: str = "base", layout: str = "sd15", seed: int = 0, **changes: Any) -> IPAdapter:
        torch.manual_seed(seed)
        widths, context = ADAPTER_LAYOUTS[layout]
        chosen = TRAIN_KINDS[kind]
        options = {"image_dim": 24, "face_dim": 16, "lora_rank": 2, "resampler_dim": 64}
        spec = new_spec(chosen.kind, widths, context, shortcut=chosen.shortcut, **(options | changes))
        adapter = IPAdapter(spec)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return adapter.requires_grad_(False).eval()

    return make
