"""Noise Image: seeded, and without a trace in the random numbers of the process."""

from __future__ import annotations

import pytest
import torch

NOISES = ["fade", "dissolve", "gaussian", "shuffle"]


@pytest.fixture
def make(pack):
    def run(noise="fade", strength=0.5, blur=0, seed=1, **options):
        return pack.NoiseImage.execute(noise, strength, blur, seed, **options).args[0]

    return run


def random_image(count=1, height=90, width=130):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(101))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("image", [None, 1, 2])
def test_an_image_of_the_encoders_size(make, noise, image):
    given = {} if image is None else {"image": random_image(image)}
    made = make(noise, **given)
    assert made.shape == (image or 1, 224, 224, 3) and 0 <= made.min() < made.max() <= 1
    assert make(noise, size=96, **given).shape[1:3] == (96, 96)


@pytest.mark.parametrize("noise", NOISES)
def test_the_seed_and_nothing_else(make, noise):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = make(noise, image=random_image())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(make(noise, image=random_image()), one)
    assert not torch.allclose(make(noise, image=random_image(), seed=2), one, atol=0.1)
    assert make(noise, image=random_image(), seed=2**64 - 1).shape == one.shape


def test_strength(pack, make):
    image = random_image()
    square = pack.image_prompt.crop_image(image, 224)
    for noise in ("fade", "dissolve", "gaussian"):
        assert torch.equal(make(noise, 0.0, image=image), square)
    distances = {s: float((make("fade", s, image=image) - square).abs().mean()) for s in (0.2, 0.5, 1.0)}
    assert distances[0.2] < distances[0.5] < distances[1.0]
    changed = (make("dissolve", 0.3, image=image) != square).float().mean()
    assert abs(float(changed) - 0.3) < 0.01
    grain = make("gaussian", 0.1, image=torch.full_like(image, 0.5)) - 0.5
    assert abs(float(grain.std()) - 0.1) < 0.005


def test_shuffle_turns_the_image_upside_down(make):
    image = torch.zeros(1, 224, 224, 3)
    image[:, :112, :112, 0] = 1.0
    torn = make("shuffle", 0.0, image=image)[..., 0]
    assert torn[:, 140:, 140:].mean() > 0.9 and torn[:, :80].mean() < 0.05 and torn[:, 140:, :80].mean() < 0.05


def test_blur(make):
    sharp, soft, softer = (make("fade", 1.0, blur) for blur in (0, 5, 31))
    assert sharp.std() > 2 * soft.std() > 4 * softer.std()
    torch.testing.assert_close(soft.mean(), sharp.mean(), atol=0.01, rtol=0)
    assert torch.equal(make("fade", 1.0, 4), soft)  # made odd


def test_as_a_negative_image(pack, world, encoder, make):
    noise = make("fade", 1.0)
    prompt = pack.EncodeImagePrompt.execute(world.adapter, encoder, random_image(), image_negative=noise).args[0]
    plain = pack.EncodeImagePrompt.execute(world.adapter, encoder, random_image()).args[0]
    drawn, base = (world.sample(world.apply(world.model, world.adapter, p)) for p in (prompt, plain))
    assert torch.isfinite(drawn).all() and not torch.allclose(drawn, base, atol=1e-3)


def test_refusals(pack, make):
    for words, options in (
        ("noise is 'static'. Choose one of: fade, dissolve", {"noise": "static"}),
        ("image holds NaN", {"image": random_image() * torch.nan}),
        ("image has the shape (9, 9, 3)", {"image": torch.zeros(9, 9, 3)}),
    ):
        with pytest.raises(pack.core.AdapterError) as error:
            make(**options)
        assert words in str(error.value), str(error.value)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_shuffle_is_torchvisions_elastic_transform(pack, strength, count):
    """Same numbers from the same seed: torchvision draws from the global generator."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = random_image(count, 64, 64)
    torch.manual_seed(11)
    tear = transforms.Compose(
        [
            transforms.ElasticTransform(alpha=75.0, sigma=(1 - strength) * 3.5),
            transforms.RandomVerticalFlip(p=1.0),
            transforms.RandomHorizontalFlip(p=1.0),
        ]
    )
    torn = tear(image.movedim(-1, 1)).movedim(1, -1)
    grain = torch.randn_like(torn) * strength * 0.75
    want = (torn * (1 - grain) + grain).clamp(0, 1)
    got = pack.noise.noise_image(image, "shuffle", strength, 0, torch.Generator().manual_seed(11))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    blurred = transforms.functional.gaussian_blur(want.movedim(-1, 1), 7).movedim(1, -1)
    soft = pack.noise.noise_image(image, "shuffle", strength, 6, torch.Generator().manual_seed(11))
    torch.testing.assert_close(soft, blurred, atol=1e-5, rtol=1e-5)
