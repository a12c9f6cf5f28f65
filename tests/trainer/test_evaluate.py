"""`ipadapter eval` on tiny models: whole evaluations, stopped ones, and by several processes."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file
from typer.testing import CliRunner

from ipadapter_core import AdapterError, IPAdapter, new_spec, save_adapter
from ipadapter_trainer.cli import app
from ipadapter_trainer.data.images import to_pil_images
from ipadapter_trainer.errors import DataError, EvaluationError
from ipadapter_trainer.evaluation.evaluate import evaluate, seed_of
from ipadapter_trainer.evaluation.report import PAPER_TABLE, Evaluation
from ipadapter_trainer.models.base_model import BaseModel
from ipadapter_trainer.models.generate import generate
from ipadapter_trainer.settings.config_file import validate
from ipadapter_trainer.settings.eval_config import EvalConfig

from .tiny_models import adapter_of
from .warm_python import WarmPython, process_environment


@pytest.fixture
def settings(small_model: BaseModel, small_folder: Path, images: Path, clip_folder: Path, tmp_path: Path) -> EvalConfig:
    torch.manual_seed(1)
    save_adapter(tmp_path / "a.safetensors", adapter_of(small_model, "base"))
    return EvalConfig(
        base_model=small_folder,
        adapter=tmp_path / "a.safetensors",
        data=images,
        clip=clip_folder,
        output=tmp_path / "evaluation",
        num_images_per_prompt=2,
        num_inference_steps=2,
        sample_images=2,
        weights=(0, 1),
    )


def changed(settings: EvalConfig, **changes: Any) -> EvalConfig:
    return validate(EvalConfig, {**settings.model_dump(), **changes})


def run(settings: EvalConfig) -> Evaluation:
    return evaluate(settings, say=lambda line: None)


def test_an_evaluation_says_what_it_measured(settings: EvalConfig) -> None:
    evaluation = run(settings)
    assert (evaluation.prompts, evaluation.images) == (6, 12)
    methods = [row.method for row in evaluation.rows]
    assert methods == [
        "image prompts",
        "weight 0: no image prompt",
        "weight 1",
        "weight 1 vs. another prompt",
    ]
    lines = [json.loads(line) for line in (settings.output / "scores.jsonl").open()]
    of_one = [line for line in lines if line["weight"] == 1]
    mean = sum(line["clip_i"] for line in of_one) / len(of_one)
    assert evaluation.rows[2].clip_i.value == pytest.approx(mean, abs=1e-6)
    text = evaluation.as_text()
    assert all(method in text for method, *_ in PAPER_TABLE)
    assert "Not comparable with the paper's numbers" in text
    assert "num_images_per_prompt is 2, not 4" in text
    assert (settings.output / "grid.png").is_file()


def test_the_seed_of_a_score_makes_its_image_again(settings: EvalConfig, small_model: BaseModel) -> None:
    run(changed(settings, limit=1, num_images_per_prompt=1))
    lines = [json.loads(line) for line in (settings.output / "scores.jsonl").open()]
    (line,) = (line for line in lines if line["weight"] == 0)
    (kept,) = (settings.output / "images").rglob(f"{line['index']:05}-0-0.png")
    pixels = generate(
        small_model,
        None,
        prompts=[""],
        image_features=None,
        seed=line["seed"],
        steps=settings.num_inference_steps,
        guidance=7.5,
    )
    difference = ImageChops.difference(Image.open(kept), to_pil_images(pixels)[0])
    assert max(high for _, high in difference.getextrema()) <= 1


def test_captions_as_prompts_give_other_images(settings: EvalConfig) -> None:
    settings = changed(settings, limit=3)
    without, with_text = run(settings), run(changed(settings, text="caption", output=settings.output / "c"))
    assert without.rows[1].clip_i != with_text.rows[1].clip_i  # at weight 0 as well
    assert "with their captions" in with_text.as_text()
    assert "text is caption, not none" in with_text.as_text()


def test_captions_are_needed_as_prompts_only(settings: EvalConfig) -> None:
    for file in settings.data.glob("*.txt"):
        file.unlink()
    evaluation = run(settings)
    assert {row.clip_t for row in evaluation.rows} == {None}
    assert evaluation.rows[2].clip_i is not None
    with pytest.raises(DataError, match="no image with a caption"):
        run(changed(settings, text="caption"))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd15", "plus"), ("sd2", "full"), ("sdxl", "base"), ("sd15", "faceid"), ("sdxl", "faceid-plusv2")],
)
def test_every_kind_and_family(settings: EvalConfig, family: str, kind: str, request: Any) -> None:
    folder = request.getfixturevalue({"sd15": "model_folder"}.get(family, f"{family}_folder"))
    model = request.getfixturevalue({"sd15": "base_model"}.get(family, f"{family}_model"))
    adapter, table = adapter_of(model, kind), settings.output.parent / "faces.safetensors"
    save_adapter(settings.adapter, adapter)
    save_file({f"{c}.png": torch.randn(512) for c in ("red", "green", "blue")}, table)
    takes_face = adapter.spec.face_dim is not None
    evaluation = run(
        changed(
            settings,
            base_model=folder,
            face_embeds=table if takes_face else None,
            shortcut=True if kind == "faceid-plusv2" else None,
            num_images_per_prompt=1,
            num_inference_steps=1,
        )
    )
    assert evaluation.prompts == (3 if takes_face else 6)
    gain = evaluation.gains[0].clip_i
    assert gain is not None and gain.value != 0  # the adapter does something


def test_a_broken_face_is_skipped_as_well(settings: EvalConfig, small_model: BaseModel) -> None:
    save_adapter(settings.adapter, adapter_of(small_model, "faceid"))
    faces = {f"{c}.png": torch.randn(512) for c in ("red", "green", "blue")}
    save_file({**faces, "teal.png": torch.full((512,), torch.nan)}, settings.data / "faces.safetensors")
    evaluation = run(changed(settings, face_embeds=settings.data / "faces.safetensors"))
    assert evaluation.prompts == 3
    assert "teal.png: the face embedding has values that are not finite" in evaluation.skipped[0]


def test_a_score_depends_on_its_example_and_number_alone(settings: EvalConfig, tmp_path: Path) -> None:
    """Batches of 1 and of 5, and fewer prompts, give the same scores."""

    def scores(**changes: Any) -> dict[tuple[int, int, float], float]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        run(changed(settings, output=output, **changes))
        lines = [json.loads(line) for line in (output / "scores.jsonl").open()]
        return {(line["index"], line["number"], line["weight"]): line["clip_i"] for line in lines}

    whole, small = scores(limit=4, batch_size=5), scores(limit=4, batch_size=1)
    assert whole.keys() == small.keys()
    assert list(whole.values()) == pytest.approx([small[key] for key in whole], abs=2e-4)
    few = scores(limit=2)
    assert len({index for index, *_ in few}) == 2
    assert all(score == pytest.approx(whole[key], abs=2e-4) for key, score in few.items())
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(1, 1, 2)


def test_it_goes_on_where_it_was_stopped(settings: EvalConfig) -> None:
    first = run(settings)
    file = settings.output / "scores.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:20])  # killed in the middle of a line
    said: list[str] = []
    again = evaluate(settings, say=said.append)
    assert "7 have scores already" in said[0]
    assert [row.clip_i.value for row in again.rows] == pytest.approx([row.clip_i.value for row in first.rows], abs=1e-6)
    more = evaluate(changed(settings, num_images_per_prompt=3), say=said.append)
    assert "24 have scores already" in said[1]
    assert more.images == 18


def test_more_sample_images_are_made_of_prompts_that_have_scores(settings: EvalConfig) -> None:
    first, said = run(settings), list[str]()
    file = settings.output / "scores.jsonl"
    lines, kept = file.read_text(), {path: path.read_bytes() for path in settings.output.rglob("images/*/*.png")}
    assert len(kept) == 8  # 2 prompts x 2 images x 2 weights
    next(iter(kept)).unlink()
    more = changed(settings, sample_images=4, batch_size=3)
    again = evaluate(more, say=said.append)
    assert "24 have scores already, 9 of them are generated again for sample_images=4." in said[0]
    assert file.read_text() == lines
    assert [row.clip_i.value for row in again.rows] == [row.clip_i.value for row in first.rows]
    found = {path: Image.open(path) for path in settings.output.rglob("images/*/*.png")}
    assert len(found) == 16
    for path, data in kept.items():  # from their seeds; batches round differently
        difference = ImageChops.difference(Image.open(io.BytesIO(data)), found[path])
        assert max(high for _, high in difference.getextrema()) <= 1
    assert Image.open(settings.output / "grid.png").height > 4 * 128
    evaluate(more, say=said.append)
    assert said[1].endswith("24 have scores already.")


def test_a_broken_image_is_skipped_and_counted(settings: EvalConfig) -> None:
    (settings.data / "red.png").write_text("not an image")
    evaluation = run(settings)
    assert evaluation.prompts == 5
    assert re.search(r"cannot be read: 1, such as .*red\.png", evaluation.as_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": ""}, "clip is missing.*clip-vit-large-patch14"),
        ({"clip": Path("nowhere")}, "nowhere: no such folder"),
        ({"data": Path("nowhere")}, "nowhere: no such file or folder"),
        ({"adapter": Path("nowhere.safetensors")}, "nowhere.safetensors: no such file"),
        ({"face_embeds": Path("f.safetensors")}, "takes no face embeddings"),
        ({"size": "60"}, "multiple of 8"),
        ({"data": Path("s-{0..9}.tar")}, "cannot read shards"),
    ],
)
def test_what_is_wrong_is_named(settings: EvalConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((EvaluationError, DataError, ValueError), match=words):
        run(changed(settings, **changes))


def test_what_does_not_fit_is_refused_before_anything_is_generated(
    settings: EvalConfig, sd2_folder: Path, random_adapter: Callable[..., IPAdapter], small_model: BaseModel
) -> None:
    with pytest.raises(EvaluationError, match="its vision half alone"):
        run(changed(settings, clip=settings.base_model / "image_encoder"))
    with pytest.raises(AdapterError, match=r"a\.safetensors is made for a model of context 32"):
        run(changed(settings, base_model=sd2_folder))
    dims = [site.dim for site in small_model.sites]
    spec = new_spec("base", dims, small_model.sites[0].cross_attention_dim, image_dim=40)
    save_adapter(settings.adapter, IPAdapter(spec))
    with pytest.raises(AdapterError, match="40"):  # of another image encoder
        run(settings)
    assert not settings.output.exists()


def test_the_command(settings: EvalConfig) -> None:
    result = settings.output.parent / "new" / "result.json"
    done = CliRunner().invoke(app, [*arguments_of(settings), "limit=2", f"result={result}"])
    assert done.exit_code == 0, done.output
    assert "IP-Adapter" in done.stdout
    assert f"Saved {result}" in done.stdout
    saved = json.loads(result.read_text())
    assert (saved["prompts"], saved["paper"]["rows"][-1]["clip_i"]) == (2, 0.828)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("clip", "", "clip is missing"),
        ("base_model", "nowhere", "nowhere: no such folder"),
        ("data", "nowhere", "nowhere: no such file or folder"),
        ("weights", "one", "expected numbers with commas"),
        ("text", "some", "expected 'none' or 'caption'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(settings: EvalConfig, key: str, value: str, words: str) -> None:
    arguments = [argument for argument in arguments_of(settings) if not argument.startswith(f"{key}=")]
    done = CliRunner().invoke(app, [*arguments, f"{key}={value}"])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def arguments_of(settings: EvalConfig) -> list[str]:
    paths = ("base_model", "adapter", "data", "clip", "output")
    numbers = ("num_images_per_prompt", "num_inference_steps", "batch_size")
    return ["eval", *(f"{name}={getattr(settings, name)}" for name in (*paths, *numbers)), "weights=0,1"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_keeps_what_is_measured(times: int, settings: EvalConfig, run_ipadapter: Any) -> None:
    process = run_ipadapter(*arguments_of(changed(settings, num_images_per_prompt=1000, batch_size=3)))
    file, deadline = settings.output / "scores.jsonl", time.monotonic() + 120
    while not (file.is_file() and file.read_text().count("\n") >= 6):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command again to resume" in err
    assert "Traceback" not in err
    lines = file.read_text().splitlines()
    assert len(lines) % 3 == 0
    said: list[str] = []
    # All of them are of the first prompt; the same settings with a few images more than that find them.
    evaluate(changed(settings, num_images_per_prompt=len(lines) // 2 + 1, limit=1), say=said.append)
    assert f"; {len(lines)} have scores already." in said[0]


def test_two_processes_share_the_work(settings: EvalConfig, tmp_path: Path, warm_python: WarmPython) -> None:
    run(settings)
    settings = changed(settings, output=tmp_path / "two")
    python = str(warm_python.executable)
    launched = subprocess.run(
        [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        + ["--main_process_port", "0", "-m", "ipadapter_trainer.cli", *arguments_of(settings)],
        # PYTHON_EXEC is the Python of the workers.
        env={**process_environment(), "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("From the paper") == 1
    files = sorted(settings.output.glob("scores*.jsonl"))
    assert [file.name for file in files] == ["scores-1.jsonl", "scores.jsonl"]
    one, two = (
        {(r["index"], r["number"], r["weight"]): r["clip_i"] for r in map(json.loads, "".join(texts).splitlines())}
        for texts in ([(tmp_path / "evaluation" / "scores.jsonl").read_text()], [file.read_text() for file in files])
    )
    assert [file.read_text().count("\n") for file in files] == [12, 12]
    assert two == pytest.approx(one, abs=2e-4)
