"""The scripts that train the stack: resumable, and each part learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipadapter_core.assets import MODEL, emoji_folder
from ipadapter_trainer.demo.alignment import NO_IMAGE
from ipadapter_trainer.demo.closeness import closer_to_own, colour_histogram, histogram_similarity
from ipadapter_trainer.demo.colours import colour_words
from ipadapter_trainer.demo.emoji import STYLE_NAMES, EmojiImages, caption, normalize, styled_caption, to_pixels
from ipadapter_trainer.models.base_model import load_base_model
from ipadapter_trainer.models.conditioning import encode_prompts
from ipadapter_trainer.models.image_features import dropped_features
from ipadapter_trainer.settings.kinds import TRAIN_KINDS
from ipadapter_trainer.training.new_adapter import adapter_spec
from tools.emoji.adapter import align_drawings
from tools.emoji.clip import (
    MAX_TOKENS,
    clip_losses,
    embed_some_patches,
    new_clip,
    said_of,
    text_states,
    tokenize,
    train_tokenizer,
)
from tools.emoji.concepts import CONCEPTS
from tools.emoji.efficientnet import EfficientNet
from tools.emoji.images import Drawings
from tools.emoji.judges import StyleClassifier, concept_losses, redrawn, style_losses
from tools.emoji.loop import Progress, fit, load_ema, mixed_precision, multiplies_bfloat16, progress
from tools.emoji.train import PARTS, Run, main
from tools.emoji.unet import new_scheduler, new_unet
from tools.emoji.vae import (
    POSTERIOR_STD,
    SD15_SCALING,
    decoder_losses,
    encode,
    fold_scaling,
    new_vae,
    only_decoder,
    vae_losses,
)
from tools.emoji.views import blend, other_tones, patchwork, warp
from tools.emoji.vision import PATCHES, WIDTH, Said, VisionTower, vision_losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def some(train_images: EmojiImages) -> EmojiImages:
    return train_images.subset(range(0, 60))


@pytest.fixture(scope="module")
def drawings(some: EmojiImages) -> Drawings:
    labels = tuple(sorted(set(some.concepts)))
    concept_ids = torch.tensor([labels.index(concept) for concept in some.concepts])
    return Drawings(some.images, labels, concept_ids, some.style_ids)


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


def test_mixed_precision_leaves_no_setting_behind() -> None:
    def settings() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        kernels = (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
        return (cuda.fp16_bf16_reduction_math_sdp_allowed(), torch.is_autocast_enabled("cpu"), *kernels)

    before = settings()
    with pytest.raises(ZeroDivisionError), mixed_precision(CPU):
        if multiplies_bfloat16(CPU):
            assert settings() != before
        raise ZeroDivisionError
    assert settings() == before


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


@pytest.mark.parametrize("batch_size", ["0", "-3"])
def test_a_batch_of_nothing_is_refused(
    batch_size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = [part for name in ("work", "images", "output") for part in (f"--{name}", str(tmp_path))]
    monkeypatch.setattr("sys.argv", ["train", "vae", *folders, "--batch-size", batch_size])
    with pytest.raises(SystemExit):
        main()
    assert f"--batch-size {batch_size}: expected at least 1" in capsys.readouterr().err


def test_load_ema_names_the_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train this part first"):
        load_ema(nn.Linear(1, 1), tmp_path / "vae.pt")


def test_the_autoencoder_learns(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, losses = new_vae(some.size), vae_losses(some, 2, CPU)

    def loss() -> float:
        with torch.no_grad():
            return losses(vae, torch.Generator().manual_seed(5))["loss"].item()

    before = loss()
    fit(vae, losses, checkpoint=tmp_path / "vae.pt", steps=12, learning_rate=1e-3, warmup=5)
    assert loss() < 0.8 * before


@torch.no_grad()
def test_folding_the_scale_changes_latents_not_images(some: EmojiImages) -> None:
    torch.manual_seed(0)
    vae = new_vae(some.size).eval()
    before = vae.decode(vae.encode(some.images[:4].float() / 127.5 - 1).latent_dist.mean).sample
    fold_scaling(vae, some.images)
    latents = encode(vae, some.images)
    posterior = vae.encode(some.images[:4].float() / 127.5 - 1).latent_dist
    assert (latents.std() * SD15_SCALING).item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-4, rtol=1e-4)
    std = torch.full_like(posterior.std, POSTERIOR_STD / SD15_SCALING)
    torch.testing.assert_close(posterior.std, std)


def test_any_ascii_prompt_has_tokens(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["red heart, noto style", "blue heart, pixel style"], tmp_path / "tokenizer")
    ids = tokenize(tokenizer, ["red heart", "", "~zebra (42%)!"])
    assert ids.shape == (3, MAX_TOKENS)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    words = tokenizer.tokenize("~zebra (42%)!")
    assert "".join(words).replace("</w>", "") == "~zebra(42%)!"
    assert tokenizer.unk_token not in words


def test_clip_learns_to_match(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(list(some.captions), tmp_path / "tokenizer")
    clip, losses = new_clip(tokenizer, some.size), clip_losses(some, tokenizer, concepts=4, pairs=8)
    first = losses(clip, torch.Generator().manual_seed(5))["loss"].item()
    fit(clip, losses, checkpoint=tmp_path / "clip.pt", steps=25, learning_rate=1e-3, warmup=5)
    assert losses(clip, torch.Generator().manual_seed(5))["loss"].item() < 0.8 * first


@torch.no_grad()
def test_all_patches_are_the_model_itself_and_half_are_not(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = new_clip(train_tokenizer(list(some.captions), tmp_path / "tokenizer"), some.size).eval()
    pixels = to_pixels(some.images[:6])
    pooled = clip.vision_model(pixel_values=normalize(pixels)).pooler_output
    whole = nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
    every, half = (embed_some_patches(clip, pixels, torch.Generator().manual_seed(1), share)[0] for share in (1.0, 0.5))
    torch.testing.assert_close(every, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(half, whole, atol=1e-3)


@torch.no_grad()
def test_the_tower_is_the_exported_image_encoder(some: EmojiImages) -> None:
    torch.manual_seed(0)
    tower, pixels = VisionTower(some.size, 9).eval(), to_pixels(some.images[:6])
    states, embeds = tower.states(pixels)
    exported = tower.encoder(pixel_values=normalize(pixels), output_hidden_states=True)
    torch.testing.assert_close(states, exported.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeds, exported.image_embeds, atol=1e-5, rtol=1e-5)
    some_of_it, _ = tower.states(pixels, torch.arange(10).expand(6, -1))
    assert some_of_it.shape == (6, 11, states.shape[-1])
    concept, style = VisionTower(some.size, len(CONCEPTS) + 9).eval().known_answers(states)
    assert (concept.shape, style.shape) == ((6, len(CONCEPTS)), (6, len(STYLE_NAMES)))


def test_the_tower_learns_from_its_teacher(drawings: Drawings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower, teacher = VisionTower(drawings.images.shape[-1], len(drawings.labels)), EfficientNet(len(drawings.labels))
    said = Said(torch.randn(len(CONCEPTS), len(STYLE_NAMES), MAX_TOKENS, WIDTH), torch.ones(len(CONCEPTS), 5, 16, 1))
    losses = vision_losses(drawings, teacher, said, batch_size=8)
    first = losses(tower, torch.Generator().manual_seed(5))
    fit(tower, losses, checkpoint=tmp_path / "vision.pt", steps=12, learning_rate=1e-3, warmup=5)
    last = losses(tower, torch.Generator().manual_seed(5))
    assert last["loss"] < 0.95 * first["loss"]
    assert last["patches"] < first["patches"]
    assert last["said"] < first["said"]
    assert tower.states(to_pixels(drawings.images[:1]))[0].shape[1] == PATCHES**2 + 1


@torch.no_grad()
def test_an_alignment_says_in_words_what_the_tower_sees(some: EmojiImages) -> None:
    base_model = load_base_model(emoji_folder() / MODEL)
    unknown = 7  # of the first concepts no caption exists
    concept_ids = torch.tensor([CONCEPTS.index(concept) for concept in some.concepts])
    concept_ids[:unknown] = len(CONCEPTS)
    drawings = Drawings(some.images, (*CONCEPTS, "a concept without a caption"), concept_ids, some.style_ids)
    torch.manual_seed(0)
    tower = VisionTower(some.size, len(drawings.labels))
    alignment = align_drawings(base_model, tower, drawings)

    pixels = to_pixels(some.images[unknown:])
    states, _ = tower.states(pixels)
    concepts, styles = (found.argmax(dim=1).tolist() for found in tower.known_answers(states))
    texts = [
        styled_caption(caption(CONCEPTS[concept]), STYLE_NAMES[style], colours)
        for concept, style, colours in zip(concepts, styles, colour_words(pixels), strict=True)
    ]
    as_they_are = alignment.hidden_states[: len(pixels)].float()
    row = torch.cdist(as_they_are.flatten(1), states.flatten(1)).argmin(dim=1)
    assert row.unique().numel() == len(pixels)
    expected = encode_prompts(base_model, texts).states[row]
    torch.testing.assert_close(alignment.text_states[: len(pixels)].float(), expected, atol=5e-3, rtol=1e-3)

    seen = 8 * len(pixels) + unknown  # eight views of a known drawing, one of another
    (no_image,) = dropped_features(base_model, adapter_spec(base_model, TRAIN_KINDS["plus"]))
    no_text = encode_prompts(base_model, [""]).states
    assert len(alignment.hidden_states) == len(alignment.text_states) == seen + int(NO_IMAGE * seen)
    for found, none in ((alignment.hidden_states, no_image), (alignment.text_states, no_text)):
        torch.testing.assert_close(found[seen:].float(), none.expand_as(found[seen:]), atol=5e-3, rtol=1e-3)


def test_what_an_image_shows_is_said_before_its_colours(some: EmojiImages, tmp_path: Path) -> None:
    """The states that count are those of any caption that begins so: the text encoder is causal."""
    texts = [styled_caption(caption(concept), style) for concept in CONCEPTS[:20] for style in STYLE_NAMES]
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer")
    clip = new_clip(tokenizer, some.size).eval()
    said = said_of(clip.text_model, tokenizer)
    assert said.states.shape == (len(CONCEPTS), len(STYLE_NAMES), MAX_TOKENS, WIDTH)
    text = styled_caption(caption(CONCEPTS[3]), STYLE_NAMES[2])
    counted = int(said.counted[3, 2].sum())
    assert counted == min(MAX_TOKENS - 1, len(tokenizer(text).input_ids) - 1)
    tokens = text_states(clip.text_model, tokenizer, [f"{text}, red"])
    three, two = torch.tensor([3]), torch.tensor([2])
    assert said.error(tokens, three, two) < 1e-10
    tokens[:, counted:] = 7.0
    assert said.error(tokens, three, two) < 1e-10
    assert said.error(tokens, three, torch.tensor([1])) > 1e-4


def test_half_of_a_batch_is_of_the_known_concepts() -> None:
    concept_ids = torch.tensor([len(CONCEPTS)] * 50 + [3, 5])
    many = Drawings(torch.zeros(52, 3, 1, 1), (), concept_ids, torch.full((52,), -1))
    rows = many.sampler(200, CPU)(torch.Generator().manual_seed(0))
    assert set(rows[::2].tolist()) == {50, 51}
    assert 40 < len(set(rows[1::2].tolist())) <= 52


def test_views_are_of_their_image() -> None:
    pixels = torch.ones(40, 3, 64, 64)
    pixels[:, 1:, 20:44, 20:44] = -1.0  # a red square
    warped = warp(pixels, torch.Generator().manual_seed(0))
    assert warped[:, 0].min() > 0.99 and warped[:, :, 0, 0].min() > 0.99  # still red, and white around it
    ink = (warped[:, 1] < 0).float().mean(dim=(1, 2))
    assert 0.5 * ink.median() < ink.min() < ink.max() < 2 * ink.median()
    mixed = blend(pixels, torch.ones_like(pixels), torch.Generator().manual_seed(0))
    centre = mixed[:, 1, 32, 32]
    assert centre.min() < -0.9 and -0.2 < centre.max() <= 0.0


def test_other_tones_keep_black_and_white() -> None:
    pixels = torch.ones(40, 3, 8, 8)
    pixels[:, :, :2], pixels[:, :, 2:4] = -1.0, torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    toned, again = (other_tones(pixels, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(toned, again)
    assert torch.equal(toned[:, :, :2], pixels[:, :, :2]) and torch.equal(toned[:, :, 4:], pixels[:, :, 4:])
    colours = toned[:, :, 3, 3]
    assert len(colours.unique(dim=0)) == 40
    assert ((colours[:, 0] > colours[:, 1]) & (colours[:, 1] > colours[:, 2])).float().mean() > 0.6
    assert colours.mean(dim=1).std() > 0.1  # some paler, some darker


def test_a_checkpoint_keeps_the_statistics_of_batch_norms(drawings: Drawings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, losses = EfficientNet(len(drawings.labels)), concept_losses(drawings, batch_size=4)
    fit(network, losses, checkpoint=tmp_path / "concepts.pt", steps=2, learning_rate=1e-3)
    again = load_ema(EfficientNet(len(drawings.labels)), tmp_path / "concepts.pt")
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.state_dict()["_bn0.num_batches_tracked"] == 2


def test_a_patchwork_is_of_both_images() -> None:
    one, other = torch.zeros(9, 3, 64, 64), torch.ones(9, 3, 64, 64)
    mixed = patchwork(one, other, torch.Generator().manual_seed(0))
    assert (mixed[..., :16] == 0).all() and (mixed[..., 48:] == 1).all()
    assert len(mixed.mean(dim=(1, 2, 3)).unique()) > 3


def test_the_decoder_alone_leaves_the_latents(some: EmojiImages, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = new_vae(some.size).eval()
    few = some.subset(range(12))
    before = encode(vae, few.images)
    losses = decoder_losses(few, vae, 2, CPU)
    first = losses(vae, torch.Generator().manual_seed(5))["loss"].item()
    fit(only_decoder(vae), losses, checkpoint=tmp_path / "decoder.pt", steps=12, learning_rate=1e-3, warmup=5)
    assert torch.equal(encode(vae, few.images), before)
    assert losses(vae, torch.Generator().manual_seed(5))["loss"].item() < 0.8 * first


def test_the_classifier_learns_styles(some: EmojiImages, drawings: Drawings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, unet = new_vae(some.size).eval(), new_unet(some.size).eval()
    classifier = StyleClassifier()
    losses = style_losses(drawings, vae, unet, torch.zeros(1, 16, WIDTH), batch_size=16, most=3)

    def error() -> float:  # with batch norms as in training: their running means need hundreds of steps
        found = [losses(classifier.train(), torch.Generator().manual_seed(seed))["loss"] for seed in range(5)]
        return torch.stack(found).mean().item()

    before = error()
    fit(classifier, losses, checkpoint=tmp_path / "judge.pt", steps=50, learning_rate=1e-3, warmup=5, bfloat16=False)
    assert error() < 0.9 * before


def test_a_redrawn_image_is_what_the_unet_says_it_is(some: EmojiImages) -> None:
    """A UNet that predicts what is there gives the image back, as far as the autoencoder does; another does not."""
    vae, images = new_vae(some.size).eval(), some.images[:2]
    with torch.no_grad():
        round_trip = vae.decode(encode(vae, images)).sample.clamp(-1, 1)

    class Knowing(torch.nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, _: Tensor) -> Any:
            alpha = new_scheduler().alphas_cumprod[timesteps][:, None, None, None]
            clean = vae.config["scaling_factor"] * encode(vae, images)
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            return SimpleNamespace(sample=alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)

    def error(unet: Any) -> float:
        drawn = redrawn(vae, unet, torch.zeros(1, 16, WIDTH), images, torch.Generator().manual_seed(0))
        return (to_pixels(drawn) - round_trip).abs().mean().item()

    assert error(Knowing()) < 0.02
    assert error(new_unet(some.size).eval()) > 0.1


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


def test_colours_in_words() -> None:
    pixels = torch.ones(3, 3, 64, 64)
    pixels[0, 1:, :20] = -1.0  # red
    pixels[0, :, 20:30] = -0.9
    pixels[1, :2, 10:40] = -0.8  # blue
    pixels[1, :, 0:1] = 0.0  # too little grey to be named
    assert colour_words(pixels) == ["red black", "blue", ""]
    assert styled_caption("lady beetle", "comic", "red black") == "lady beetle, comic style, red black"
    assert styled_caption("lady beetle", "comic") == "lady beetle, comic style"


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((120, 70, 40), "brown"),
        ((255, 204, 50), "yellow"),
        ((250, 140, 30), "orange"),
        ((255, 180, 190), "pink"),
        ((90, 150, 60), "green"),
        ((60, 140, 220), "blue"),
        ((130, 60, 190), "purple"),
        ((240, 80, 180), "pink"),
        ((130, 130, 135), "grey"),
        ((225, 228, 230), "white"),
        ((20, 22, 30), "black"),
        ((220, 40, 60), "red"),
    ],
)
def test_each_colour_has_its_name(colour: tuple[int, int, int], name: str) -> None:
    pixels = to_pixels(torch.tensor(colour)).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert colour_words(pixels) == [name]


def test_closer_to_own_counts_pairs() -> None:
    assert closer_to_own(torch.eye(5)) == 1.0
    assert closer_to_own(-torch.eye(5)) == 0.0
    assert closer_to_own(torch.zeros(5, 5)) == 0.5
    random = torch.rand(400, 400, generator=torch.Generator().manual_seed(0))
    assert closer_to_own(random) == pytest.approx(0.5, abs=0.05)


def test_the_classifier_has_one_output_a_style() -> None:
    assert StyleClassifier()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
