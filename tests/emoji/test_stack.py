"""The bundled model: standard tools load it, it is small, and the demo and the quality table run on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ipadapter_core import diffusers_sites, load_adapter
from ipadapter_core.assets import MODEL, emoji_folder, is_for_emoji
from ipadapter_trainer.demo import run as demo_run
from ipadapter_trainer.demo.alignment import cancel_empty_text
from ipadapter_trainer.demo.batches import draw_batch, encode_emoji
from ipadapter_trainer.demo.closeness import choose_references
from ipadapter_trainer.demo.emoji import EmojiImages, to_pixels
from ipadapter_trainer.demo.run import COLUMNS, ROWS, demo, train_demo_adapter
from ipadapter_trainer.errors import TrainerError
from ipadapter_trainer.models.base_model import BaseModel, load_base_model
from ipadapter_trainer.models.conditioning import TextStates, encode_prompts
from ipadapter_trainer.models.features import encode_pixels
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.adapted_unet import adapt_unet
from ipadapter_trainer.training.new_adapter import new_adapter
from ipadapter_trainer.training.objective import noisy_latents_and_target
from tools.emoji.adapter import COARSE, COLOURS, TAUGHT, taught_loss
from tools.emoji.images import load_drawings
from tools.emoji.loop import fit, progress
from tools.emoji.quality import Judges, judge_the_judges, load_judges
from tools.emoji.stack import load_clip, load_unet, load_vae, unpack
from tools.emoji.unet import new_unet, unet_losses

FOLDER = emoji_folder()
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return load_base_model(FOLDER / MODEL)


@pytest.fixture(scope="module")
def judges(base_model: BaseModel) -> Judges:
    return load_judges(base_model, FOLDER / "judges.safetensors")


def test_the_model_is_small_and_has_the_sd15_layout(base_model: BaseModel) -> None:
    size = sum(file.stat().st_size for file in (FOLDER / MODEL).rglob("*") if file.is_file())
    assert size <= 40 * MEGABYTE
    assert not list((FOLDER / MODEL).rglob("*.bin"))
    assert len(diffusers_sites(base_model.unet)) == 16
    assert base_model.vae.config["latent_channels"] == 4
    assert base_model.vae.config["scaling_factor"] == 0.18215
    assert base_model.latent_scale == 8
    assert all(is_for_emoji(new_adapter(base_model, TRAIN_KINDS[kind]).spec) for kind in ("base", "plus"))


def test_the_parts_have_names_that_old_and_new_transformers_know() -> None:
    index = json.loads((FOLDER / MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    libraries = {part[0] for part in index.values() if isinstance(part, list)}
    assert libraries == {"diffusers", "transformers", None}


def test_diffusers_loads_the_model_and_the_adapter_and_draws(held_out: EmojiImages) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(FOLDER), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    prompt = Image.fromarray(held_out.images[0].permute(1, 2, 0).numpy())
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "", ip_adapter_image=prompt, height=128, width=128, num_inference_steps=4, generator=generator
    ).images[0]
    assert image.size == (128, 128)
    assert image.getextrema() != ((0, 0),) * 3


@torch.no_grad()
def test_the_autoencoder_gives_images_back(base_model: BaseModel, held_out: EmojiImages) -> None:
    pixels = to_pixels(held_out.images[::20])
    latents = encode_pixels(base_model, pixels)
    assert latents.shape[1:] == (4, 16, 16)
    assert 0.8 < latents.std() < 1.2
    output = base_model.vae.decode(latents / base_model.vae.config["scaling_factor"]).sample
    assert (output - pixels).abs().mean() < 0.15  # the mean image is at 0.5


@pytest.mark.parametrize(("name", "kind", "tokens"), [("adapter", "plus", 16), ("adapter_base", "base", 4)])
def test_the_bundled_adapters(name: str, kind: str, tokens: int) -> None:
    adapter = load_adapter(FOLDER / f"{name}.safetensors")
    assert (adapter.spec.kind, adapter.spec.num_tokens, len(adapter.spec.layer_ids)) == (kind, tokens, 16)
    assert adapter.metadata["ipadapter.base_model"] == MODEL


def test_the_judges_know_real_images(judges: Judges, held_out: EmojiImages) -> None:
    published = json.loads((FOLDER / "quality.json").read_text(encoding="utf-8"))["judges_on_real_held_out_images"]
    measured = judge_the_judges(judges, held_out)
    assert min(measured.values()) > 0.95
    assert measured == pytest.approx(published, abs=0.005)


def test_references_are_distinct_held_out_concepts_and_fixed(held_out: EmojiImages) -> None:
    rows = choose_references(held_out, 128)
    assert rows == choose_references(held_out, 128)
    assert rows != choose_references(held_out, 128, seed=1)
    assert len({held_out.concepts[row] for row in rows}) == 128


@pytest.mark.parametrize("recoloured", [0, 2])
def test_each_image_is_its_own_prompt(base_model: BaseModel, train_images: EmojiImages, recoloured: int) -> None:
    some = train_images.subset(range(0, 40))
    features = encode_emoji(base_model, some, "image_embeds", recoloured=recoloured)
    assert features.latents.shape[:2] == features.image_features.shape[:2] == (2 + recoloured, 40)
    drawn = draw_batch(features, 512, torch.Generator().manual_seed(0))
    batch, drop_image = drawn.features, drawn.drop_image_embeds
    assert drawn.noise.shape == batch.latents.shape

    def found(seen: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The view and the row of each."""
        views, rows = known.shape[:2]
        nearest = (seen.flatten(1)[:, None] - known.reshape(views * rows, -1)[None]).abs().sum(-1).argmin(-1)
        return nearest // rows, nearest % rows

    view, target = found(batch.latents, features.latents)
    seen_view, reference = found(batch.image_features[0], features.image_features)
    assert torch.equal(target, drawn.rows) and torch.equal(view, drawn.views)
    assert torch.equal(view, seen_view)  # the image prompt is what is to be drawn, mirrored and recoloured alike
    assert torch.equal(reference, target)
    without_text = (batch.text.states == features.no_text).flatten(1).all(-1)
    assert 0.85 < without_text.float().mean() < 0.97
    named = drawn.rows[~without_text]
    assert torch.equal(batch.text.states[~without_text], features.text_states[named])
    assert 0.05 < drop_image.float().mean() < 0.16
    assert ((view >= 2).float().mean() > 0.15) == (recoloured > 0)
    assert 0.7 < (drawn.timesteps >= 400).float().mean() < 0.9  # where it is decided what is drawn
    assert drawn.timesteps.min() < 100 and drawn.timesteps.max() >= 990


def test_all_prompts_but_the_first_view_are_disguised(base_model: BaseModel, train_images: EmojiImages) -> None:
    some = train_images.subset(range(0, 4))
    plain, changed = (
        encode_emoji(base_model, some, "image_embeds", own=2, recoloured=2, disguise=disguise)
        for disguise in (None, lambda pixels, _: pixels.flip(-2))
    )
    assert torch.equal(plain.latents, changed.latents)
    same = [torch.equal(a, b) for a, b in zip(plain.image_features, changed.image_features, strict=True)]
    assert same == [True, False, True, False]


@pytest.mark.parametrize("empty", [True, False])
def test_image_tokens_that_are_a_captions_states_draw_it(
    empty: bool, base_model: BaseModel, train_images: EmojiImages
) -> None:
    """Before any training: beside an empty text, values copied from the text's give another image;
    after ``cancel_empty_text`` they give the caption's."""
    some = train_images.subset(range(0, 64))
    adapter = new_adapter(base_model, TRAIN_KINDS["plus"])
    features = encode_emoji(base_model, some, "hidden_states", own=1)
    batch = draw_batch(features, 32, torch.Generator().manual_seed(1))
    captions = encode_prompts(base_model, [""] * 64 if empty else list(some.captions)).states
    noisy, _ = noisy_latents_and_target(base_model.scheduler, batch.features.latents, batch.noise, batch.timesteps)

    def error() -> float:
        with torch.no_grad(), adapt_unet(base_model, adapter) as denoising:
            denoising.disable_adapter()
            wanted = denoising.predict(noisy, batch.timesteps, TextStates(captions[batch.rows], None))
            denoising.application.key_values = adapter.keys_values(captions[batch.rows])
            denoising.application.rows = range(32)
            no_text = features.no_text.expand(32, -1, -1)
            return (
                (denoising.predict(noisy, batch.timesteps, TextStates(no_text, None)) - wanted).square().mean().item()
            )

    before = error()
    generator = torch.Generator().manual_seed(0)
    states = encode_prompts(base_model, list(some.captions)).states
    cancel_empty_text(base_model, adapter, features.latents[0], states, features.no_text, generator)
    assert error() < 0.3 * before


def test_the_base_model_teaches_the_details(base_model: BaseModel, train_images: EmojiImages) -> None:
    """With an adapter that adds nothing, what is left to learn is a part of the details, and all that is coarse."""
    some = train_images.subset(range(0, 8))
    features = encode_emoji(base_model, some, "image_embeds")
    batch = draw_batch(features, 16, torch.Generator().manual_seed(0))
    adapter = new_adapter(base_model)
    with torch.no_grad(), adapt_unet(base_model, adapter) as denoising:
        for layer in adapter.layers.children():
            layer.to_v_ip.weight.zero_()
        given, latents = batch.features.text, batch.features.latents
        kept = replace(batch, drop_image_embeds=torch.zeros(16))
        noisy, target = noisy_latents_and_target(base_model.scheduler, latents, batch.noise, batch.timesteps)
        denoising.enable_adapter(batch.features.image_features, kept.drop_image_embeds)
        left = denoising.predict(noisy, batch.timesteps, given) - target
        coarse = F.interpolate(F.avg_pool2d(left, COARSE), scale_factor=COARSE, mode="bilinear")
        remaining = coarse + (1 - TAUGHT) * (left - coarse)
        expected = remaining.square().mean() + COLOURS * F.avg_pool2d(remaining, COARSE).square().mean()
        assert taught_loss(denoising, kept, given).item() == pytest.approx(expected.item(), rel=1e-4)
        dropped = replace(batch, drop_image_embeds=torch.ones(16))
        untaught = denoising.loss(dropped) + COLOURS * F.avg_pool2d(left, COARSE).square().mean()
        assert taught_loss(denoising, dropped, given).item() == pytest.approx(untaught.item(), rel=1e-4)


def test_demo_training_leaves_the_base_model_as_it_was(base_model: BaseModel, train_images: EmojiImages) -> None:
    before = list(base_model.unet.attn_processors.values())
    trained = train_demo_adapter(base_model, train_images.subset(range(0, 32)), minutes=0.04, seed=0)
    assert trained.steps >= 1
    assert trained.images == 32 * trained.steps
    assert list(base_model.unet.attn_processors.values()) == before


def test_demo_with_the_bundled_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "STEPS", 2)
    demo(tmp_path / "demo.png", adapter="bundled", minutes=2.0, seed=0)
    printed = capsys.readouterr().out
    assert "with adapter" in printed
    assert str(tmp_path / "demo.png") in printed
    with Image.open(tmp_path / "demo.png") as image:
        side = 128 + 8
        assert image.size == ((len(COLUMNS) + 1) * side + 8, 28 + ROWS * side)


def test_demo_asks_for_an_image_file_before_it_trains(tmp_path: Path) -> None:
    for output, message in (
        (tmp_path / "demo.txt", "unknown image suffix '.txt'. Use .png"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(TrainerError, match=message):
            demo(output, adapter=None, minutes=60.0, seed=0)


def test_the_shipped_weights_can_be_trained_further(tmp_path: Path, train_images: EmojiImages) -> None:
    some = train_images.subset(range(0, 16))
    unpack(FOLDER, load_drawings(some, None), tmp_path)
    shipped = load_base_model(FOLDER / MODEL)
    unet, vae, (clip, tokenizer) = load_unet(tmp_path, 128), load_vae(tmp_path, some), load_clip(tmp_path, 128)
    for ours, theirs in zip(unet.parameters(), shipped.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(clip.text_model.parameters(), shipped.text_encoders[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    losses = unet_losses(some, some.subset(range(4)), vae, clip.text_model, tokenizer, batch_size=8, views=1)
    fit(new_unet(128), losses, checkpoint=tmp_path / "unet.pt", steps=2, learning_rate=1e-4)
    assert progress(tmp_path / "unet.pt").step == 2
