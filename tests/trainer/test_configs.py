"""The shipped configs: what their heads say is true, and each one trains."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ipadapter_core import infer_spec, load_adapter, read_checkpoint, save_adapter
from ipadapter_trainer.files.published import published_differences
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.published_models import model_at
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import config_of_arguments, load_config
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.new_adapter import new_adapter
from ipadapter_trainer.training.train import train

from .conftest import draw_image
from .plans import plan_of
from .tiny_models import COLOURS

ROOT = Path(__file__).parents[2]
FAMILIES = ("sd15", "sd2", "sdxl")
CONFIGS = [ROOT / "configs" / f"{family}-{kind}.toml" for family in FAMILIES for kind in TRAIN_KINDS]
FINETUNE = ROOT / "configs" / "sd15-plus-finetune.toml"
EMOJI = ROOT / "configs" / "emoji-base.toml"
PARTS = ("image_proj", "ip_adapter")

# The published tensors, and their names in that file.
WEIGHT_KEYS = json.loads((ROOT / "tests" / "core" / "golden" / "weight_keys.json").read_text())
GOLDEN_FAMILIES = {"sd15": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
GOLDEN_KINDS = {
    "base": "base_vith",
    "plus": "plus",
    "full": "full",
    "faceid": "faceid",
    "faceid-plus": "faceid_plus(v2)",
    "faceid-plusv2": "faceid_plus(v2)",
    "portrait": "faceid_portrait",
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions, a table of face embeddings, and crops as references."""
    folder = tmp_path_factory.mktemp("faces")
    rows, table = [], {}
    for number, colour in enumerate(COLOURS):
        draw_image(colour).save(folder / f"{colour}.png")
        draw_image(colour, (40, 40)).save(folder / f"{colour}-face.png")
        rows.append({"file_name": f"{colour}.png", "text": f"a {colour} square", "reference": f"{colour}-face.png"})
        table[f"{colour}.png"] = torch.nn.functional.one_hot(torch.tensor(number), 512).float()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file(table, str(folder / "faces.safetensors"))
    return folder


pytestmark = pytest.mark.usefixtures("shared_counts")


def test_there_is_one_for_each_kind_and_family() -> None:
    assert sorted((ROOT / "configs").glob("*.toml")) == sorted([*CONFIGS, FINETUNE, EMOJI])


def overrides(file: Path, base: Path, faces: Path, *more: str) -> list[str]:
    kind = TRAIN_KINDS[kind_of(file)]
    given = [f"base_model={base}", f"data={faces}", *more]
    given += [f"image_encoder={base / 'image_encoder'}"] if kind.takes_image else []
    return given + ([f"face_embeds={faces / 'faces.safetensors'}"] if kind.takes_face else [])


def family_of(file: Path) -> str:
    return file.stem.split("-")[0]


def kind_of(file: Path) -> str:
    return file.stem.split("-", 1)[1].removesuffix("-finetune")


@pytest.mark.parametrize("file", [*CONFIGS, FINETUNE], ids=lambda file: file.stem)
def test_its_head_says_the_command_and_what_it_needs(file: Path, published: dict[str, Path], faces: Path) -> None:
    head = re.sub(r"\n# ", " ", file.read_text().split("\n\n")[0])
    command = next(line for line in file.read_text().splitlines() if "ipadapter train" in line).removeprefix("#")
    program, word, *arguments = shlex.split(command)
    assert (program, word, arguments[0]) == ("ipadapter", "train", file.stem)
    config = config_of_arguments(TrainConfig, "train", arguments)
    assert config.kind == kind_of(file)
    for name in (config.base_model, config.image_encoder, config.init_from):
        assert name is None or model_at(name) is not None  # `ipadapter models` downloads it

    family = family_of(file)
    config = load_config(TrainConfig, file, overrides(file, published[family], faces))
    plan = plan_of(config)
    images = config.steps * config.batch_size * config.gradient_accumulation_steps
    cached, whole = (
        flops / config.batch_size for flops in (plan.cost.flops, plan.cost.flops + plan.cost.encoder_flops)
    )
    unit, seconds = {"E": (1e18, 3600), "P": (1e15, 60)}["P" if file == FINETUNE else "E"]
    said = numbers(head, r"Trains ([\d.]+) M parameters and needs (\d+) GB of GPU memory.* The ([\d,]+) steps take")
    assert said == pytest.approx([plan.trained / 1e6, plan.memory / 1e9, config.steps], rel=0.05, abs=0.51)
    work = r"take (\d+) .FLOP \(([\d.]+) TFLOP per image\): ([\d,]+) (?:hours|minutes) on GPUs that sustain 100 TFLOP/s"
    said = numbers(head, work)
    expected = [whole * images / unit, whole / 1e12, whole * images / 1e14 / seconds]
    assert said == pytest.approx(expected, rel=0.05, abs=0.51)
    if file != FINETUNE:
        said = numbers(head, r"With a cache: (\d+) EFLOP \(([\d.]+) TFLOP per image\)")
        assert said == pytest.approx([cached * images / unit, cached / 1e12], rel=0.05, abs=0.51)

    golden = WEIGHT_KEYS[GOLDEN_FAMILIES[family]][GOLDEN_KINDS[kind_of(file)]]
    assert plan.trained == sum(math.prod(shape) for part in PARTS for shape in golden[part].values())
    assert published_differences(plan.spec) == ()  # with the UNet's 2048 in SDXL's plus, hosts take it for Kolors


def numbers(text: str, pattern: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return [float(value.replace(",", "")) for value in found.groups()]


SMALL = ("resolution=64", "batch_size=2", "steps=2", "num_workers=0", "log_with=none")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_trains(file: Path, faces: Path, tmp_path: Path, small_folders: dict[str, Path]) -> None:
    """Two steps on a small base of its family, everything else as it stands in the file."""
    base = small_folders[family_of(file)]
    more = (f"output={tmp_path / 'run'}", *SMALL, "gradient_accumulation_steps=2")
    spec = infer_spec(read_checkpoint(train(load_config(TrainConfig, file, overrides(file, base, faces, *more)))))
    kind = TRAIN_KINDS[kind_of(file)]
    assert (spec.kind, spec.shortcut) == (kind.kind, kind.shortcut)


def test_the_fine_tune_goes_on_from_its_file(
    faces: Path, small_folder: Path, small_model: BaseModel, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    start = new_adapter(small_model, TRAIN_KINDS["plus"])
    save_adapter(tmp_path / "start.safetensors", start)
    more = (f"output={tmp_path / 'run'}", *SMALL, "lr_warmup_steps=0", f"init_from={tmp_path / 'start.safetensors'}")
    end = load_adapter(train(load_config(TrainConfig, FINETUNE, overrides(FINETUNE, small_folder, faces, *more))))
    moved = torch.cat([(a - b).flatten() for a, b in zip(end.parameters(), start.parameters(), strict=True)]).abs()
    assert 0 < moved.max() < 1e-3


def test_the_emoji_config_runs_in_a_checkout(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    more = (f"data={images}", f"output={tmp_path / 'run'}", "log_with=none")
    plan, config = plan_of(load_config(TrainConfig, EMOJI, more)), load_config(TrainConfig, EMOJI)
    work = (plan.cost.flops + plan.cost.encoder_flops) * config.steps
    head = re.sub(r"\n# ", " ", EMOJI.read_text().split("\n\n")[0])
    said = numbers(head, r"Trains ([\d.]+) M parameters and needs ([\d.]+) GB.* The (\d+) steps take (\d+) TFLOP")
    assert said == pytest.approx([plan.trained / 1e6, plan.memory / 1e9, config.steps, work / 1e12], rel=0.05, abs=0.06)
    assert infer_spec(read_checkpoint(train(load_config(TrainConfig, EMOJI, (*more, "steps=2"))))).kind == "base"
