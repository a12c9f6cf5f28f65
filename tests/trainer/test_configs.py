"""The shipped configs: what their heads say is true, and each one trains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import config_of_arguments, load_config
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.dry_run import Plan, plan_text, plan_training
from ipadapter_trainer.training.train import train
from safetensors.torch import save_file

from ipadapter_core import infer_spec, read_checkpoint

from .conftest import draw_picture
from .published_bases import write_published_base
from .tiny_models import COLOURS

ROOT = Path(__file__).parents[2]
FAMILIES = ("sd15", "sd2", "sdxl")
CONFIGS = [ROOT / "configs" / f"{family}-{kind}.toml" for family in FAMILIES for kind in TRAIN_KINDS]

# Trained parameters in millions, from the published modules: base with ViT-H, plus, faceid, faceid-plus, portrait.
PARAMETERS = {
    "sd15-base": 22.32,
    "sd15-plus": 49.09,
    "sd15-full": 21.79,
    "sd15-faceid": 48.36,
    "sd15-faceid-plus": 78.26,
    "sd15-portrait": 32.29,
    "sdxl-base": 349.2,
    "sdxl-plus": 423.7,
    "sdxl-faceid": 535.5,
    "sdxl-faceid-plusv2": 743.7,
    "sdxl-portrait": 374.9,
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, a table of face embeddings, and crops as references."""
    folder = tmp_path_factory.mktemp("faces")
    rows, table = [], {}
    for number, colour in enumerate(COLOURS):
        draw_picture(colour).save(folder / f"{colour}.png")
        draw_picture(colour, (40, 40)).save(folder / f"{colour}-face.png")
        rows.append({"file_name": f"{colour}.png", "text": f"a {colour} square", "reference": f"{colour}-face.png"})
        table[f"{colour}.png"] = torch.nn.functional.one_hot(torch.tensor(number), 512).float()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file(table, str(folder / "faces.safetensors"))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {family: write_published_base(folder / family, family) for family in FAMILIES}


def test_there_is_one_for_each_kind_and_family() -> None:
    assert sorted((ROOT / "configs").glob("*.toml")) == sorted(CONFIGS)


def overrides(file: Path, base: Path, faces: Path, *more: str) -> list[str]:
    kind = TRAIN_KINDS[file.stem.split("-", 1)[1]]
    given = [f"base_model={base}", f"data={faces}", *more]
    given += [f"image_encoder={base / 'image_encoder'}"] if kind.takes_image else []
    return given + ([f"face_embeds={faces / 'faces.safetensors'}"] if kind.takes_face else [])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_its_head_says_the_command_and_what_it_needs(file: Path, published: dict[str, Path], faces: Path) -> None:
    head = re.sub(r"\n# ", " ", file.read_text().split("\n\n")[0])
    command = next(line for line in file.read_text().splitlines() if "ipadapter train" in line).removeprefix("#")
    program, word, *arguments = shlex.split(command)
    assert (program, word, arguments[0]) == ("ipadapter", "train", f"configs/{file.name}")
    assert config_of_arguments("train", [str(ROOT / arguments[0]), *arguments[1:]]).kind == file.stem.split("-", 1)[1]

    config = load_config(file, overrides(file, published[file.stem.split("-")[0]], faces))
    plan = plan_training(config)
    found = re.search(
        r"Trains ([\d.]+) M parameters.* needs (\d+) GB on a GPU.* are (\d+) EFLOP \(([\d.]+) TFLOP a picture\), "
        r"([\d,]+) hours.*With a cache they are (\d+) EFLOP \(([\d.]+)\)",
        head,
    )
    assert found is not None
    said = [float(value.replace(",", "")) for value in found.groups()]
    images = config.steps * config.batch_size * config.gradient_accumulation
    cached, whole = (
        flops / config.batch_size for flops in (plan.cost.flops, plan.cost.flops + plan.cost.encoder_flops)
    )
    today = [plan.trained / 1e6, plan.memory / 1e9, whole * images / 1e18, whole / 1e12]
    today += [whole * images / 1e14 / 3600, cached * images / 1e18, cached / 1e12]
    assert said == pytest.approx(today, rel=0.05, abs=0.51)
    if file.stem == "sdxl-plus":  # with the UNet's 2048 in its place, hosts would take it for Kolors
        assert (plan.spec.resampler_width, plan.spec.heads, plan.spec.tokens) == (1280, 20, 16)
    if file.stem in PARAMETERS:
        assert plan.trained / 1e6 == pytest.approx(PARAMETERS[file.stem], rel=2e-3)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_trains(file: Path, faces: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two steps on a tiny base of its family, everything else as it stands in the file."""
    family, kind = file.stem.split("-", 1)
    base = request.getfixturevalue({"sd15": "model_folder", "sd2": "sd2_folder", "sdxl": "sdxl_folder"}[family])
    small = ("resolution=64", "batch_size=2", "gradient_accumulation=2", "steps=2", "workers=0", "log_with=none")
    config = load_config(file, overrides(file, base, faces, f"output={tmp_path / 'run'}", *small))
    spec = infer_spec(read_checkpoint(train(config)))
    assert (spec.kind, spec.shortcut) == (TRAIN_KINDS[kind].kind, TRAIN_KINDS[kind].shortcut)


def plan_of(published: dict[str, Path], faces: Path, family: str, **settings: object) -> Plan:
    base = {"base_model": published[family], "data": str(faces), "output": "unused", "steps": 10, "batch_size": 1}
    return plan_training(TrainConfig(**base | settings))


@pytest.mark.parametrize(
    ("family", "resolution", "forward", "both"), [("sd15", 512, 0.804, 1.67), ("sdxl", 512, 1.592, 3.188)]
)
def test_the_work_is_that_of_the_published_models(
    family: str, resolution: int, forward: float, both: float, published: dict[str, Path], faces: Path
) -> None:
    """TFLOPs a picture as measured on the original's processors; encoders: VAE 1.117, ViT-H 0.335, text."""
    plan = plan_of(published, faces, family, resolution=resolution)
    assert plan.cost.forward_flops / 1e12 == pytest.approx(forward, rel=0.01)
    assert plan.cost.flops / 1e12 == pytest.approx(both, rel=0.025)
    text = {"sd15": 0.013, "sdxl": 0.111}[family]
    assert plan.cost.encoder_flops / 1e12 == pytest.approx(1.117 + 0.335 + text, rel=0.01)


def test_memory_follows_the_settings(published: dict[str, Path], faces: Path) -> None:
    plain = plan_of(published, faces, "sd15")
    half = plan_of(published, faces, "sd15", mixed_precision="bf16")
    eighth = plan_of(published, faces, "sd15", mixed_precision="fp8")
    cached = plan_of(published, faces, "sd15", mixed_precision="bf16", cache="anywhere")
    frugal = plan_of(published, faces, "sd15", mixed_precision="bf16", gradient_checkpointing=True, cache="anywhere")
    memory = [plan.memory for plan in (plain, half, eighth)]
    assert memory == sorted(memory, reverse=True)
    assert half.bytes["frozen weights"] == plain.bytes["frozen weights"] / 2
    assert cached.frozen == pytest.approx(859.5e6, rel=1e-3)  # the UNet alone
    assert cached.cost.encoder_flops == 0
    assert frugal.bytes["activations"] < 0.3 * cached.bytes["activations"]
    average = plan_of(published, faces, "sd15", ema_decay=0.999)
    assert average.memory - plain.memory == 4 * plain.trained


def test_the_plan_is_printed(published: dict[str, Path], faces: Path) -> None:
    config = load_config(CONFIGS[0], overrides(CONFIGS[0], published["sd15"], faces))
    text = plan_text(config, plan_training(config))
    assert "22.32 M trained" in text
    assert "6 pictures" in text
    assert "1,6" in text  # GFLOPs a picture
    assert not Path(config.output).exists()
