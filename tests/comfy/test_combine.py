"""Combine Image Prompts: two to five prompts, each with its weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch

METHODS = ["add", "subtract", "average", "norm average", "max", "min"]


@pytest.fixture
def combine(pack):
    def run(*prompts, combine="concat", **weights):
        names = {f"image_prompt_{number}": prompt for number, prompt in enumerate(prompts, 1)}
        return pack.CombineImagePrompts.execute(combine=combine, **names, **weights).args[0]

    return run


@pytest.fixture
def encode(pack, world, encoder):
    def run(seed=1, count=1, adapter=world.adapter, **options):
        image = torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(seed))
        return pack.EncodeImagePrompt.execute(adapter, encoder, image, **options).args[0]

    return run


@pytest.fixture(scope="module")
def plus(world):
    with torch.inference_mode():
        return world.new_adapter(world.model, kind="plus", name="plus")


@pytest.fixture
def draw(world):
    def run(prompt, adapter=world.adapter, **options):
        return world.sample(world.apply(world.model, adapter, prompt), **options)

    return run


def close(got, want, tolerance=1e-3):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def by_hand(method, rows):
    """The definitions, over the images of all prompts."""
    x = torch.stack(list(rows))
    norm = x.square().sum(0).sqrt()
    return {
        "add": x.sum(0),
        "subtract": x[0] - x[1:].mean(0),
        "average": x.mean(0),
        "norm average": (x / norm).mean(0),
        "max": x.max(0).values,
        "min": x.min(0).values,
    }[method]


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_concat_is_encoding_the_images_together(pack, world, encoder, encode, combine, draw, plus, kind):
    adapter = world.adapter if kind == "base" else plus
    images = [torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    at_once = pack.EncodeImagePrompt.execute(adapter, encoder, torch.cat(images)).args[0]
    together = draw(combine(encode(1, adapter=adapter), encode(2, adapter=adapter)), adapter)
    close(together, draw(at_once, adapter))
    assert not torch.allclose(together, draw(encode(1, adapter=adapter), adapter), atol=1e-2)


def test_concat_weighs_the_values_of_each(world, encode, combine, draw):
    one, two = encode(1, weight=0.5), encode(2)
    together = combine(one, two, weight_1=0.8, weight_2=-0.3)
    assert together.positive.weights == (0.4, -0.3)
    assert not torch.allclose(draw(together), draw(combine(one, two)), atol=1e-2)
    # The weights of all alike are the weight of Apply IP Adapter.
    half = world.apply(world.model, world.adapter, combine(encode(1), two), weight=0.5)
    close(draw(combine(encode(1), two, weight_1=0.5, weight_2=0.5)), world.sample(half))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_methods_calculate_with_weighted_features(world, encode, combine, plus, draw, method, kind):
    adapter = world.adapter if kind == "base" else plus
    prompts = [encode(seed, adapter=adapter, weight=weight) for seed, weight in ((1, 1.0), (2, 0.5), (3, 1.0))]
    made = combine(*prompts, combine=method, weight_2=0.6, weight_3=-0.7)
    x = [prompt.positive.image[0] for prompt in prompts]
    close(made.positive.image[0], by_hand(method, [x[0], 0.5 * 0.6 * x[1], -0.7 * x[2]]), 1e-5)
    assert made.positive.weights == (1.0,) and len(made.positive) == 1
    assert made.negative is None if kind == "base" else made.negative.weights == (1.0,)
    assert torch.isfinite(draw(made, adapter)).all()


def test_all_images_of_a_prompt_take_part(encode, combine):
    many, one = encode(1, count=3), encode(2)
    made = combine(many, one, combine="average")
    close(made.positive.image[0], torch.cat([many.positive.image, one.positive.image]).mean(0), 1e-5)
    assert len(combine(many, one, one, one, one).positive) == 7


def test_one_image_for_each_latent(encode, combine):
    frames, other, one = (encode(seed, count=count, one_each=True) for seed, count in ((1, 3), (2, 3), (3, 1)))
    made = combine(frames, other, combine="add", weight_2=0.5)
    assert made.one_each and len(made.positive) == 3
    close(made.positive.image, frames.positive.image + 0.5 * other.positive.image, 1e-5)
    made = combine(frames, one, combine="average")
    close(made.positive.image, (frames.positive.image + one.positive.image) / 2, 1e-5)
    row = combine(frames, one, weight_2=0.3)
    assert row.one_each and row.positive.weights == (1.0, 1.0, 1.0, 0.3)
    assert torch.equal(row.positive.image, torch.cat([frames.positive.image, one.positive.image]))


def test_a_negative_that_all_share_stays_one(encode, combine, plus, draw):
    for method in ("concat", "average"):
        made = combine(encode(1, adapter=plus), encode(2, adapter=plus), combine=method, weight_2=0.5)
        assert len(made.negative) == 1 and not made.has_negative
        assert made.negative.weights == ((0.75,) if method == "concat" else (1.0,))
        frames = combine(*(encode(seed, 2, plus, one_each=True) for seed in (1, 2)), combine=method)
        assert len(frames.negative) == 1 and torch.isfinite(draw(frames, plus, batch=4)).all()
    assert combine(encode(1), encode(2)).negative is None


def test_different_negatives_are_joined(encode, combine, draw):
    noise = torch.rand(2, 32, 32, 3)
    one, two, three = encode(1, image_negative=noise[:1]), encode(2, image_negative=noise[1:]), encode(3)
    made = combine(one, two, three, weight_2=0.5)
    assert made.has_negative and made.negative.weights == (1.0, 0.5, 1.0)
    want = torch.cat([one.negative.image, two.negative.image, torch.zeros(1, 48)])
    assert torch.equal(made.negative.image, want)  # zeros are what the third stands for
    average = combine(one, two, three, combine="average", weight_2=0.5)
    assert average.negative.weights == (1.0,) * 3 and torch.equal(average.negative.image, want)
    assert torch.isfinite(draw(made)).all() and not torch.allclose(draw(made), draw(combine(one, one)), atol=1e-3)


def test_negatives_of_one_image_for_each_latent(pack, encode, combine, draw):
    noise = torch.rand(3, 32, 32, 3)
    each = encode(1, 2, one_each=True, image_negative=noise[:2])
    single = encode(2, 3, one_each=True, image_negative=noise[2:])
    made = combine(each, single)
    want = torch.cat([each.negative.image, *[single.negative.image] * 3])
    assert len(made.positive) == 5 and torch.equal(made.negative.image, want)
    assert torch.isfinite(draw(made, batch=5)).all()
    twice = combine(each, each)
    assert len(twice.positive) == len(twice.negative) == 4
    with pytest.raises(pack.core.AdapterError, match=r"different negative images.*the same image_negative"):
        combine(encode(3, 3, one_each=True), single, combine="add")


def face_prompt(pack, seed, image=True, count=1, **options):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 5, 48, generator=generator) if image else None
    faces = pack.types.EncodedImages(states, torch.randn(count, 16, generator=generator), (1.0,) * count)
    against = pack.types.EncodedImages(torch.zeros(1, 5, 48), torch.zeros(1, 16)) if image else None
    return pack.types.ImagePrompt(faces, against, "face.safetensors", **options)


@pytest.mark.parametrize("image", [True, False])
def test_face_prompts_combine_too(pack, combine, image):
    one, two = (face_prompt(pack, seed, image, likeness=0.7) for seed in (1, 2))
    made = combine(one, two, combine="average", weight_2=0.5)
    close(made.positive.face, (one.positive.face + 0.5 * two.positive.face) / 2, 1e-6)
    assert made.likeness == 0.7 and (made.positive.image is not None) == image
    joined = combine(one, two)
    assert torch.equal(joined.positive.face, torch.cat([one.positive.face, two.positive.face]))
    assert len(joined.positive.features) == 1 + image
    assert (joined.negative is None) != image


def frames_of_faces(pack, seed, weights, negative=True):
    """As Encode Face Prompt makes it of a video: weight 0 where a frame shows no face, zeros as the negative."""
    made = face_prompt(pack, seed, image=False, count=len(weights), one_each=True)
    zeros = pack.types.EncodedImages(None, torch.zeros(len(weights), 16), weights) if negative else None
    faces = dataclasses.replace(made.positive, weights=weights)
    return dataclasses.replace(made, positive=faces, negative=zeros)


@pytest.mark.parametrize("method", METHODS)
def test_frames_without_a_face(pack, combine, method):
    """Left out, instead of a face of zeros; where no video shows one the frame has none."""
    one = frames_of_faces(pack, 1, (1.0, 0.0, 0.0, 1.0))
    two = frames_of_faces(pack, 2, (1.0, 1.0, 0.0, 0.0))
    made = combine(one, two, combine=method)
    x, y = one.positive.face, two.positive.face
    nothing_to_subtract_from = method == "subtract"
    weights = (1.0, 0.0 if nothing_to_subtract_from else 1.0, 0.0, 1.0)
    assert made.positive.weights == made.negative.weights == weights
    close(made.positive.face[0], by_hand(method, [x[0], y[0]]), 1e-6)
    assert nothing_to_subtract_from or torch.equal(made.positive.face[1], y[1])
    assert torch.equal(made.positive.face[3], x[3]), "at full length"
    assert not made.negative.face.any()
    half = combine(one, two, combine=method, weight_1=0.5)
    assert half.positive.weights == weights and torch.equal(half.positive.face[3], 0.5 * x[3])


def test_frames_without_a_face_in_one_video(pack, combine):
    """The other one has no negative, which is zeros too."""
    all_faces, some = frames_of_faces(pack, 1, (1.0,) * 3, negative=False), frames_of_faces(pack, 2, (1.0, 0.0, 1.0))
    for prompts in ((all_faces, some), (some, all_faces)):
        made = combine(*prompts, combine="average")
        assert made.positive.weights == (1.0,) * 3 and set(made.negative.weights) == {1.0}
        assert torch.equal(made.positive.face[1], all_faces.positive.face[1]) and not made.has_negative
    portrait = frames_of_faces(pack, 3, (1.0,), negative=False)
    made = combine(some, portrait, combine="average", weight_2=0.0)
    assert made.positive.weights == made.negative.weights == (1.0, 0.0, 1.0)
    assert torch.equal(made.positive.face[2], some.positive.face[2])
    joined = combine(combine(all_faces, all_faces, combine="average"), some)
    assert joined.positive.weights == joined.negative.weights == (1.0, 1.0, 1.0, 1.0, 0.0, 1.0)


def test_frames_without_a_face_beside_one_negative_image(pack, combine):
    """FaceID-Plus: one negative image for all frames, or one for each when a frame was skipped, is the same."""
    weights = (1.0, 0.0, 1.0)
    whole, skipped = (face_prompt(pack, seed, count=3, one_each=True) for seed in (1, 2))
    skipped = dataclasses.replace(
        skipped,
        positive=dataclasses.replace(skipped.positive, weights=weights),
        negative=pack.types.EncodedImages(torch.zeros(3, 5, 48), torch.zeros(3, 16), weights),
    )
    made = combine(whole, skipped, combine="average")
    assert made.negative.weights == (1.0,) and made.positive.weights == (1.0,) * 3
    twice = combine(skipped, skipped, combine="average")
    assert twice.positive.weights == twice.negative.weights == weights
    other = dataclasses.replace(whole, negative=dataclasses.replace(whole.negative, image=torch.ones(1, 5, 48)))
    with pytest.raises(pack.core.AdapterError, match="different negative images"):
        combine(other, skipped, combine="average")


def test_a_negative_without_weight_where_no_video_shows_a_face(pack, combine):
    skipped = frames_of_faces(pack, 1, (1.0, 0.0), negative=False)
    negative = pack.types.EncodedImages(None, torch.ones(1, 16))
    made = combine(dataclasses.replace(skipped, negative=negative), skipped)
    assert made.negative.weights == made.positive.weights == (1.0, 0.0, 1.0, 0.0)
    assert torch.equal(made.negative.face[:, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(pack.core.AdapterError, match="'subtract' leaves nothing: no image is left to subtract from"):
        combine(skipped, skipped, combine="subtract", weight_1=0.0)


def test_an_unknown_adapter_takes_the_known_one(encode, combine):
    old = dataclasses.replace(encode(2), adapter=None)
    assert combine(old, encode(1)).adapter == combine(encode(1), old).adapter == "a.safetensors"
    assert combine(old, old).adapter is None


def test_refusals(pack, encode, combine, plus):
    def refuse(*words, prompts, **options):
        with pytest.raises(pack.core.AdapterError) as error:
            combine(*prompts, **options)
        assert all(word in str(error.value) for word in words), str(error.value)

    one, two = encode(1), encode(2)
    refuse(
        "image_prompt_1 was encoded with a.safetensors, image_prompt_3 was encoded with plus.safetensors",
        "one adapter",
        prompts=(one, two, encode(1, adapter=plus)),
    )
    unknown = dataclasses.replace(encode(1, adapter=plus), adapter=None)
    refuse("image_prompt_1 has features of 48, image_prompt_2 has features of 5 x 48", prompts=(one, unknown))
    each = encode(2, 3, one_each=True)
    refuse("image_prompt_1 has images that act together, image_prompt_2 has one image for each", prompts=(one, each))
    two_each = encode(2, 2, one_each=True)
    refuse("image_prompt_2 has 3 images", "and image_prompt_1 2", prompts=(two_each, each), combine="add")
    faces = face_prompt(pack, 1, likeness=1.0), face_prompt(pack, 2, likeness=0.5)
    refuse("image_prompt_1 has likeness 1, image_prompt_2 has likeness 0.5", prompts=faces)
    refuse("'subtract' leaves nothing", prompts=(one, one), combine="subtract")
    refuse("combine is 'swirl'. Choose one of: concat", prompts=(one, two), combine="swirl")
    wrong = dataclasses.replace(two, negative=pack.types.EncodedImages(torch.zeros(1, 40)))
    refuse("image_prompt_2 has features of 48, its negative images of 40", prompts=(one, wrong))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_what_leaves_nothing_is_refused(pack, encode, combine, plus, method, kind):
    """The features of nothing are an image of their own, which nobody chose."""
    options = {"adapter": plus} if kind == "plus" else {}
    one, two = encode(1, **options), encode(2, **options)
    each = encode(3, 2, one_each=True, **options)
    weights = {"weight_1": 0.0, "weight_2": 0.0}
    for prompts in ((one, two), (each, each)):
        with pytest.raises(pack.core.AdapterError, match=f"combine '{method}' leaves nothing"):
            combine(*prompts, combine=method, **weights)
    made = combine(one, two, combine=method, weight_1=0.0)
    assert made.positive.image.any()
    if method in ("add", "average", "norm average"):
        with pytest.raises(pack.core.AdapterError, match="the images cancel each other out"):
            combine(one, one, combine=method, weight_2=-1.0)


def test_weights_of_zero_switch_the_prompt_off(world, encode, combine, draw):
    off = combine(encode(1), encode(2), weight_1=0.0, weight_2=0.0)
    assert torch.equal(draw(off), world.base)
