"""What `ipadapter eval` is made of: the measuring CLIP, the prompts, the means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ipadapter_trainer.data.examples import Example
from ipadapter_trainer.data.images import open_rgb
from ipadapter_trainer.errors import BaseModelError, DataError, EvaluationError
from ipadapter_trainer.evaluation.clip import ClipModel, clip_i, clip_t, is_vit_l, load_clip
from ipadapter_trainer.evaluation.prompts import is_coco, open_prompts, read_examples
from ipadapter_trainer.evaluation.report import PAPER_TABLE, Mean, differences, mean_over_prompts
from ipadapter_trainer.evaluation.scores import Score
from ipadapter_trainer.settings.eval_config import EvalConfig

from .conftest import draw_image
from .tiny_models import COLOURS


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> ClipModel:
    return load_clip(clip_folder)


# --- The scores


def test_the_scores_are_the_papers() -> None:
    """CLIP-I is a cosine; CLIP-T is CLIPScore, 2.5 times the cosine and never negative (arXiv 2104.08718)."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    assert clip_i(one, other).item() == pytest.approx(0.6)
    assert clip_t(one, other).item() == pytest.approx(1.5)
    assert clip_t(one, -other).item() == 0
    assert clip_i(one, -other).item() == pytest.approx(-0.6)
    # The paper's CLIP-T divided by the factor is what ViT-L/14's cosines are.
    assert all(0.15 < table_t / 2.5 < 0.27 for _, _, table_t, _ in PAPER_TABLE)


def test_the_cosines_are_those_of_transformers_own_clip(clip: ClipModel, clip_folder: Path) -> None:
    """Against CLIPModel.forward: its logits are cosines times a scale."""
    images, texts = [draw_image(c) for c in COLOURS], [f"a {c} square" for c in COLOURS]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    with torch.no_grad():
        said = model(
            **tokenizer(texts, padding=True, return_tensors="pt"),
            pixel_values=clip._encoder.processor(images=images, return_tensors="pt").pixel_values,
        )
    cosines = (said.logits_per_image / model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(
        clip_t(clip.embed_images(images), clip.embed_texts(texts)), 2.5 * cosines.clamp(min=0), atol=1e-5, rtol=1e-4
    )


def test_a_image_is_as_like_itself_as_can_be(clip: ClipModel, images: Path) -> None:
    opened = [open_rgb(file)[0] for file in sorted(images.glob("*.png"))]
    embeds = clip.embed_images(opened)
    torch.testing.assert_close(clip_i(embeds, embeds), torch.ones(len(opened)))
    torch.testing.assert_close(clip.embed_images(opened[2:3]), embeds[2:3], atol=1e-5, rtol=1e-5)
    texts = clip.embed_texts(["a red square", "a very long text " * 50])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))


# --- The CLIP


def vit_l(**changes: object) -> CLIPConfig:
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 224}
    return CLIPConfig(vision_config={**vision, "num_attention_heads": 16, **changes}, projection_dim=768)


def test_only_openais_vit_l_is_the_papers() -> None:
    assert is_vit_l(vit_l())
    assert not is_vit_l(vit_l(hidden_act="gelu"))  # LAION's
    assert not is_vit_l(vit_l(image_size=336))
    assert not is_vit_l(CLIPConfig())


def test_what_is_no_clip_is_refused(clip_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="its text half alone"):
        load_clip(model_folder / "text_encoder")
    with pytest.raises(EvaluationError, match=rf"^clip={tmp_path}: no config\.json in it\. clip takes a folder"):
        load_clip(tmp_path)
    folder = shutil.copytree(clip_folder, tmp_path / "half")
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 of the tensors .* such as text_projection\.weight"):
        load_clip(folder)


def test_another_clip_has_another_fingerprint(clip: ClipModel, clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "other")
    assert load_clip(folder).fingerprint() == clip.fingerprint()
    state = load_file(folder / "model.safetensors")
    state["text_projection.weight"] *= 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_clip(folder).fingerprint() != clip.fingerprint()


# --- The prompts


def test_a_lower_limit_is_a_beginning_and_changes_no_other_prompt(clip: ClipModel, images: Path) -> None:
    examples = read_examples(images)
    whole = open_prompts(examples, clip)
    assert sorted(whole.by_index) == list(range(6))
    for limit in range(1, 6):
        few = open_prompts(examples, clip, limit=limit)
        assert list(few.by_index) == list(whole.by_index)[:limit]
        for index, other in few.different.items():
            expected = whole.different[index]
            assert other is not None and expected is not None and other.index == expected.index
    assert list(open_prompts(examples, clip, seed=1).by_index) != list(whole.by_index)


def test_the_other_prompt_shows_another_image(clip: ClipModel) -> None:
    same = [Example(draw_image("red"), f"{n}") for n in range(4)]
    assert set(open_prompts(same, clip).different.values()) == {None}
    prompts = open_prompts([*same, Example(draw_image("blue"), "blue")], clip)
    for index, other in prompts.different.items():
        assert other is not None and (other.index == 4) == (index != 4)


def test_a_reference_is_the_prompt(clip: ClipModel, images: Path) -> None:
    row = {"file_name": "red.png", "text": "a red square", "reference": ["blue.png", "teal.png"]}
    (images / "metadata.jsonl").write_text(json.dumps(row))
    (prompt,) = open_prompts(read_examples(images), clip).by_index.values()
    assert Path(prompt.name).name == "blue.png"
    blue = clip.embed_images([open_rgb(images / "blue.png")[0]])[0]
    torch.testing.assert_close(prompt.image_embed, blue, atol=1e-5, rtol=1e-5)


def test_a_prefix_goes_before_the_caption(clip: ClipModel, images: Path) -> None:
    examples = read_examples(images)[:1]
    (prompt,) = open_prompts(examples, clip, caption_prefix="A photo depicts ").by_index.values()
    expected = clip.embed_texts([f"A photo depicts {examples[0].text}"])[0]
    torch.testing.assert_close(prompt.text_embed, expected)


def test_nothing_to_read_is_an_error(clip: ClipModel, images: Path, tmp_path: Path) -> None:
    for file in images.glob("*.png"):
        file.write_text("not an image")
    with pytest.raises(DataError, match=r"None of the 6 prompts can be read. The first: .*not an image"):
        open_prompts(read_examples(images), clip)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: an empty folder\. Put images into it"):
        read_examples(tmp_path / "empty")


@pytest.mark.parametrize("place", ["val2017", "annotations/val2017", "elsewhere"])
def test_cocos_annotations(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(folder / f"{number:012}.jpg")
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.parent.mkdir(exist_ok=True)
    content = {
        "images": [{"file_name": f"{n:012}.jpg", "id": n, "width": 8, "height": 8} for n in (2, 1, 3)],
        "annotations": [
            {"image_id": n, "id": n * 10 + i, "caption": f"{i} of {n} \n"} for i in (0, 1) for n in (1, 2, 3)
        ],
    }
    file.write_text(json.dumps(content))
    if place == "elsewhere":
        with pytest.raises(DataError, match=r"none of its 3 images is in .*set data_root"):
            read_examples(file)
    examples = read_examples(file, folder if place == "elsewhere" else None)
    assert [(e.image, e.text) for e in examples] == [
        (folder / "000000000002.jpg", "0 of 2"),
        (folder / "000000000001.jpg", "0 of 1"),
    ]
    assert not is_coco(file, examples)
    assert is_coco(file, examples * 2500)


# --- The means


def score(index: int, number: int, clip_i: float) -> Score:
    return Score(index, number, 1.0, 0, "p", clip_i, None, None, None)


def test_the_error_counts_prompts_and_not_images() -> None:
    scores = [score(i, n, value) for i, value in enumerate((0.2, 0.4, 0.9)) for n in range(4)]
    mean = mean_over_prompts(scores, lambda s: s.clip_i)
    assert mean is not None and mean.error is not None
    assert mean.value == pytest.approx(0.5)
    assert mean.error == pytest.approx(torch.tensor([0.2, 0.4, 0.9]).std().item() / 3**0.5)
    assert mean_over_prompts(scores[:4], lambda s: s.clip_i) == Mean(pytest.approx(0.2), None)
    assert mean_over_prompts(scores, lambda s: s.clip_t) is None


def test_a_data_root_without_a_list_is_refused() -> None:
    paths = {"base_model": Path("b"), "adapter": Path("a"), "clip": Path("c"), "data_root": Path("images")}
    EvalConfig(**paths, data=Path("list.JSON"))
    with pytest.raises(ValueError, match=r"data_root is for \.json.*'folder'"):
        EvalConfig(**paths, data=Path("folder"))


def test_only_the_papers_settings_are_comparable(clip: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvalConfig(base_model=Path("b"), adapter=Path("a"), data=Path("d"), clip=Path("c"))
    assert len(differences(settings, clip, coco=False, family="sdxl")) == 3
    monkeypatch.setattr(clip, "is_vit_l", True)
    assert differences(settings, clip, coco=True, family="sd15") == []
