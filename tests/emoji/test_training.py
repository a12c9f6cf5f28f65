"""The scripts that train the stack: resumable, and each part learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ipadapter_trainer.demo.emoji import EmojiImages, augment, normalize, to_pixels
from ipadapter_trainer.demo.judges import (
    StyleClassifier,
    closer_to_own,
    colour_histogram,
    histogram_similarity,
    style_features,
)
from tools.shipped_emoji.clip import (
    MAX_TOKENS,
    clip_losses,
    embed_some_patches,
    new_clip,
    patchwork,
    tokenize,
    train_tokenizer,
)
from tools.shipped_emoji.judges import classifier_losses
from tools.shipped_emoji.loop import Progress, fit, load_ema, progress
from tools.shipped_emoji.train import PARTS, Run, main
from tools.shipped_emoji.vae import (
    POSTERIOR_STD,
    SD15_SCALING,
    decoder_losses,
    encode,
    fold_scaling,
    new_vae,
    only_decoder,
    vae_losses,
)


@pytest.fixture(scope="module")
def some(train_images: EmojiImages) -> EmojiImages:
    return train_images.subset(range(0, 60))


def _toy(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(8, 4, generator=generator)
    return {"loss": (nn.functional.dropout(model(x), 0.3) - x.sum(-1, keepdim=True)).square().mean()}


def test_fit_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def start() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(4, 1)

    whole = fit(start(), _toy, checkpoint=tmp_path / "whole.pt", steps=30, learning_rate=1e-2)
    fit(start(), _toy, checkpoint=tmp_path / "parts.pt", steps=12, learning_rate=1e-2)
    parts = fit(start(), _toy, checkpoint=tmp_path / "parts.pt", steps=30, learning_rate=1e-2)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(load_ema(start(), tmp_path / "whole.pt").parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fit_stops_after_its_minutes(tmp_path: Path) -> None:
    fit(nn.Linear(4, 1), _toy, checkpoint=tmp_path / "x.pt", steps=10**9, minutes=0.005, learning_rate=1e-2)
    assert 0 < torch.load(tmp_path / "x.pt", weights_only=True)["step"] < 10**6


def test_a_checkpoint_counts_the_images_of_every_batch_size(tmp_path: Path) -> None:
    fit(nn.Linear(4, 1), _toy, checkpoint=tmp_path / "x.pt", steps=3, batch_size=8, learning_rate=1e-2)
    fit(nn.Linear(4, 1), _toy, checkpoint=tmp_path / "x.pt", steps=5, batch_size=32, learning_rate=1e-2)
    assert progress(tmp_path / "x.pt") == Progress(step=5, images=3 * 8 + 2 * 32)


def test_a_larger_batch_has_a_larger_learning_rate(some: EmojiImages, tmp_path: Path) -> None:
    def run(batch_size: int | None) -> Run:
        return Run(tmp_path, some, tmp_path, tmp_path, steps=1, minutes=1.0, batch_size=batch_size)

    assert run(None).sized(64, 5e-4) == {"batch_size": 64, "learning_rate": 5e-4}
    assert run(256).sized(64, 5e-4) == {"batch_size": 256, "learning_rate": pytest.approx(1e-3)}


def test_parts_take_the_batch_size_that_was_asked_for(some: EmojiImages, tmp_path: Path) -> None:
    run = Run(tmp_path, some, tmp_path, tmp_path, steps=2, minutes=1.0, batch_size=5)
    for part in ("vae", "decoder"):
        PARTS[part](run)
        assert progress(tmp_path / f"{part}.pt") == Progress(step=2, images=10)


def test_a_checkpoint_without_a_count_of_images_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    fit(nn.Linear(4, 1), _toy, checkpoint=file, steps=3, learning_rate=1e-2)
    state = torch.load(file, weights_only=True)
    del state["images"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"x\.pt holds 3 steps and no count of images.*train this part anew"):
        fit(nn.Linear(4, 1), _toy, checkpoint=file, steps=4, learning_rate=1e-2)


@pytest.mark.parametrize("batch_size", ["0", "-3"])
def test_a_batch_of_nothing_is_refused(
    batch_size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "vae", "--work", str(tmp_path), "--batch-size", batch_size])
    with pytest.raises(SystemExit):
        main()
    assert f"--batch-size {batch_size}: expected at least 1" in capsys.readouterr().err


def test_load_ema_names_the_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train this part first"):
        load_ema(nn.Linear(1, 1), tmp_path / "vae.pt")


def test_the_autoencoder_learns(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, losses = new_vae(), vae_losses(some, batch_size=2)

    def loss() -> float:
        with torch.no_grad():
            return losses(vae, torch.Generator().manual_seed(5))["loss"].item()

    before = loss()
    fit(vae, losses, checkpoint=tmp_path / "vae.pt", steps=12, learning_rate=1e-3, warmup=5)
    assert loss() < 0.8 * before


@torch.no_grad()
def test_folding_the_scale_changes_latents_not_images(some: EmojiImages) -> None:
    torch.manual_seed(0)
    vae = new_vae().eval()
    before = vae.decode(vae.encode(some.images[:4].float() / 127.5 - 1).latent_dist.mean).sample
    fold_scaling(vae, some.images)
    latents = encode(vae, some.images)
    posterior = vae.encode(some.images[:4].float() / 127.5 - 1).latent_dist
    assert (latents.std() * SD15_SCALING).item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-4, rtol=1e-4)
    std = torch.full_like(posterior.std, POSTERIOR_STD / SD15_SCALING)
    torch.testing.assert_close(posterior.std, std)


def test_augment_keeps_white_outside_and_is_seeded(some: EmojiImages) -> None:
    pixels = torch.full((16, 3, 64, 64), -1.0)
    once, again = (augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert set(once.unique().tolist()) == {-1.0, 1.0}


def test_any_ascii_prompt_has_tokens(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["red heart, noto style", "blue heart, flat style"], tmp_path / "tokenizer")
    ids = tokenize(tokenizer, ["red heart", "", "~zebra (42%)!"])
    assert ids.shape == (3, MAX_TOKENS)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    words = tokenizer.tokenize("~zebra (42%)!")
    assert "".join(words).replace("</w>", "") == "~zebra(42%)!"
    assert tokenizer.unk_token not in words


def test_clip_learns_to_match(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(list(some.captions), tmp_path / "tokenizer")
    clip, losses = new_clip(tokenizer), clip_losses(some, tokenizer, concepts=4, pairs=8)
    first = losses(clip, torch.Generator().manual_seed(5))["loss"].item()
    fit(clip, losses, checkpoint=tmp_path / "clip.pt", steps=25, learning_rate=1e-3, warmup=5)
    assert losses(clip, torch.Generator().manual_seed(5))["loss"].item() < 0.8 * first


@torch.no_grad()
def test_all_patches_are_the_model_itself_and_half_are_not(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = new_clip(train_tokenizer(list(some.captions), tmp_path / "tokenizer")).eval()
    pixel_values = normalize(to_pixels(some.images[:6]))
    pooled = clip.vision_model(pixel_values=pixel_values).pooler_output
    whole = nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
    every, half = (
        embed_some_patches(clip, pixel_values, torch.Generator().manual_seed(1), share) for share in (1.0, 0.5)
    )
    torch.testing.assert_close(every, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(half, whole, atol=1e-3)


def test_a_patchwork_is_of_both_images() -> None:
    one, other = torch.zeros(9, 3, 64, 64), torch.ones(9, 3, 64, 64)
    mixed = patchwork(one, other, torch.Generator().manual_seed(0))
    assert (mixed[..., :16] == 0).all() and (mixed[..., 48:] == 1).all()
    assert len(mixed.mean(dim=(1, 2, 3)).unique()) > 3


def test_the_decoder_alone_leaves_the_latents(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = new_vae().eval()
    few = some.subset(range(12))
    before = encode(vae, few.images)
    losses = decoder_losses(few, vae, batch_size=2)
    first = losses(vae, torch.Generator().manual_seed(5))["loss"].item()
    fit(only_decoder(vae), losses, checkpoint=tmp_path / "decoder.pt", steps=12, learning_rate=1e-3, warmup=5)
    assert torch.equal(encode(vae, few.images), before)
    assert losses(vae, torch.Generator().manual_seed(5))["loss"].item() < 0.8 * first


def test_the_classifier_learns_styles(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier, losses = StyleClassifier(), classifier_losses(some, new_vae().eval(), batch_size=32)
    first = losses(classifier, torch.Generator().manual_seed(5))["loss"].item()
    fit(classifier, losses, checkpoint=tmp_path / "judge.pt", steps=60, learning_rate=2e-3, warmup=5)
    assert losses(classifier, torch.Generator().manual_seed(5))["loss"].item() < 0.8 * first


def test_style_features_are_blind_to_place_and_background() -> None:
    pixels = torch.ones(3, 3, 64, 64)
    pixels[0, 1:, 4:12, 4:12] = -1.0
    pixels[1, 1:, 40:48, 20:28] = -1.0
    pixels[2, :2, 40:48, 20:28] = -1.0  # another colour
    one, moved, blue = style_features(pixels)
    assert torch.equal(one, moved)
    assert not torch.allclose(one, blue)


def test_histogram_tells_colours_apart_and_ignores_the_background() -> None:
    pixels = torch.ones(3, 3, 64, 64)
    pixels[0, 1:, :32] = -1.0  # half red
    pixels[1, 1:, :8] = -1.0  # an eighth red
    pixels[2, :2, :32] = -1.0  # half blue
    histogram = colour_histogram(pixels)
    similarity = histogram_similarity(histogram, histogram)
    torch.testing.assert_close(histogram.sum(-1), torch.ones(3))
    assert similarity[0, 1] == pytest.approx(1.0)
    assert similarity[0, 2] == pytest.approx(0.0)


def test_closer_to_own_counts_pairs() -> None:
    assert closer_to_own(torch.eye(5)) == 1.0
    assert closer_to_own(-torch.eye(5)) == 0.0
    assert closer_to_own(torch.zeros(5, 5)) == 0.5
    random = torch.rand(400, 400, generator=torch.Generator().manual_seed(0))
    assert closer_to_own(random) == pytest.approx(0.5, abs=0.05)


def test_the_classifier_has_one_output_a_style() -> None:
    assert StyleClassifier()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
