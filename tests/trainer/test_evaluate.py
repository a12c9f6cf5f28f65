"""`ipadapter eval`: the scores by hand, and a whole evaluation on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ipadapter_trainer.data.pixels import open_rgb
from ipadapter_trainer.emoji.clip import new_clip, train_tokenizer
from ipadapter_trainer.errors import DataError, EvaluationError
from ipadapter_trainer.evaluation.clip import clip_i, clip_t, load_clip
from ipadapter_trainer.evaluation.evaluate import evaluate, seed_of
from ipadapter_trainer.evaluation.report import PAPER_TABLE, Evaluation
from ipadapter_trainer.evaluation.settings import EvalSettings, parse_weights
from ipadapter_trainer.models.base_model import BaseModel

from ipadapter_core import save_adapter

from .tiny_models import COLOURS, adapter_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random CLIP, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    new_clip(train_tokenizer([f"a {c} square" for c in COLOURS], folder, size=300)).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base_model: BaseModel, model_folder: Path, pictures: Path, clip: Path, tmp_path: Path) -> EvalSettings:
    torch.manual_seed(1)
    save_adapter(tmp_path / "a.safetensors", adapter_of(base_model, "base"))
    return EvalSettings(
        base_model=model_folder,
        adapter=tmp_path / "a.safetensors",
        data=pictures,
        clip=clip,
        output=tmp_path / "evaluation",
        images_per_caption=2,
        steps=2,
        pictures=2,
        controls=True,
    )


def run(settings: EvalSettings) -> Evaluation:
    return evaluate(settings, say=lambda line: None)


def test_the_scores_are_the_papers() -> None:
    """CLIP-I is a cosine; CLIP-T is CLIPScore, 2.5 times the cosine and never negative (arXiv 2104.08718)."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    assert clip_i(one, other).item() == pytest.approx(0.6)
    assert clip_t(one, other).item() == pytest.approx(1.5)
    assert clip_t(one, -other).item() == 0
    assert clip_i(one, -other).item() == pytest.approx(-0.6)


def test_a_picture_is_as_like_itself_as_can_be(clip: Path, pictures: Path) -> None:
    measuring = load_clip(clip)
    opened = [open_rgb(file)[0] for file in sorted(pictures.glob("*.png"))]
    embeds = measuring.embed_pictures(opened)
    torch.testing.assert_close(clip_i(embeds, embeds), torch.ones(len(opened)))
    torch.testing.assert_close(measuring.embed_pictures(opened[2:3]), embeds[2:3], atol=1e-5, rtol=1e-5)
    texts = measuring.embed_texts(["a red square", "a very long text " * 50])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))


def test_an_evaluation_says_what_it_measured(settings: EvalSettings) -> None:
    evaluation = run(settings)
    assert (evaluation.prompts, evaluation.pictures) == (6, 12)
    methods = [row.method for row in evaluation.rows]
    assert methods == [
        "the prompts themselves",
        "weight 0: no image prompt",
        "weight 1",
        "weight 1 beside another prompt",
    ]
    lines = [json.loads(line) for line in (settings.output / "scores.jsonl").open()]
    of_one = [line for line in lines if line["weight"] == 1]
    mean = sum(line["clip_i"] for line in of_one) / len(of_one)
    assert evaluation.rows[2].clip_i.value == pytest.approx(mean, abs=1e-6)
    text = evaluation.as_text()
    assert all(method in text for method, *_ in PAPER_TABLE)
    assert "Not to be compared with the paper's numbers" in text
    assert "images per caption 2, not 4" in text
    assert (settings.output / "grid.png").is_file()


def test_a_score_depends_on_its_example_and_number_alone(settings: EvalSettings, tmp_path: Path) -> None:
    """Batches of 1 and of 5, and fewer prompts, give the same scores."""

    def scores(**changes: Any) -> dict[tuple[int, int, float], float]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        run(replace(settings, output=output, **changes))
        lines = [json.loads(line) for line in (output / "scores.jsonl").open()]
        return {(line["index"], line["number"], line["weight"]): line["clip_i"] for line in lines}

    whole, small = scores(batch_size=5), scores(batch_size=1)
    assert whole.keys() == small.keys()
    assert list(whole.values()) == pytest.approx([small[key] for key in whole], abs=2e-4)
    few = scores(limit=2)
    assert len({index for index, *_ in few}) == 2
    assert all(score == pytest.approx(whole[key], abs=2e-4) for key, score in few.items())
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(1, 1, 2)


def test_it_goes_on_where_it_was_stopped(settings: EvalSettings) -> None:
    first = run(settings)
    file = settings.output / "scores.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:20])  # killed in the middle of a line
    said: list[str] = []
    again = evaluate(settings, say=said.append)
    assert "7 are measured already" in said[0]
    assert [row.clip_i.value for row in again.rows] == pytest.approx([row.clip_i.value for row in first.rows], abs=1e-6)
    more = evaluate(replace(settings, images_per_caption=3), say=said.append)
    assert "24 are measured already" in said[1]
    assert more.pictures == 18


def test_a_broken_picture_is_skipped_and_counted(settings: EvalSettings) -> None:
    (settings.data / "red.png").write_text("not a picture")
    evaluation = run(settings)
    assert evaluation.prompts == 5
    assert "1 pictures were skipped" in evaluation.as_text()
    assert "red.png" in evaluation.as_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": None}, "--clip is missing.*clip-vit-large-patch14"),
        ({"clip": Path("nowhere")}, "nowhere: no such folder"),
        ({"data": Path("nowhere")}, "nowhere: no such file or folder"),
        ({"adapter": Path("nowhere.safetensors")}, "nowhere.safetensors: no such file"),
        ({"face_embeds": Path("f.safetensors")}, "takes no face embeddings"),
    ],
)
def test_what_is_wrong_is_named(settings: EvalSettings, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((EvaluationError, DataError, ValueError), match=words):
        run(replace(settings, **changes))


def test_half_a_clip_is_no_clip(settings: EvalSettings, model_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="its vision half alone"):
        run(replace(settings, clip=model_folder / "image_encoder"))


def test_weights_are_numbers_with_commas() -> None:
    assert parse_weights("0,0.5,1") == (0.0, 0.5, 1.0)
    with pytest.raises(EvaluationError, match="expected numbers"):
        parse_weights("0;1")


def test_the_command(settings: EvalSettings, run_ipadapter: Any) -> None:
    arguments = ["eval", "--base-model", settings.base_model, "--adapter", settings.adapter, "--data", settings.data]
    arguments += ["--output", settings.output, "--steps", 1, "--images-per-caption", 1, "--limit", 2]
    process = run_ipadapter(*arguments, "--clip", settings.clip, "--json", settings.output.parent / "result.json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "IP-Adapter" in out
    assert json.loads((settings.output.parent / "result.json").read_text())["prompts"] == 2
    process = run_ipadapter(*arguments)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "--clip is missing" in err) == (2, True)
