"""Tiles: square parts of an image beside the whole of it, and an encoder that runs once for the same image."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch


@pytest.fixture
def runs(encoder):
    """The number of images in every run of the encoder."""
    seen = []
    handle = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.fixture
def encode(pack, world, encoder):
    def run(image, adapter=world.adapter, **options):
        return pack.EncodeImagePrompt.execute(adapter, encoder, image, **options).args[0]

    return run


def images(count=1, height=40, width=64, seed=91):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_every_tile_is_an_image_of_its_own(encode, world, runs):
    """What the encoder makes of a tile is what it makes of that part of the image."""
    image = images()
    prompt = encode(image, tiles=1)
    parts = torch.cat([image[:, :, :40], image[:, :, 24:]])
    want = torch.cat([encode(image).positive.image, encode(parts).positive.image])
    assert runs[0] == 3 and len(prompt.positive) == 3 and len(prompt.negative or ()) == 0
    torch.testing.assert_close(prompt.positive.image, want, atol=1e-4, rtol=1e-4)
    tiled = world.sample(world.apply(world.model, world.adapter, prompt))
    assert torch.isfinite(tiled).all()
    assert not torch.allclose(tiled, world.sample(world.apply(world.model, world.adapter, encode(image))), atol=1e-3)


def test_tiles_of_two_images_and_the_preview(pack, world, encoder):
    output = pack.EncodeImagePrompt.execute(world.adapter, encoder, images(2, 40, 40), tiles=2, combine="average")
    assert len(output.args[0].positive) == 1
    assert len(output.ui.as_dict()["images"]) == 2 + 2 * 4


def test_a_mask_leaves_out_the_tiles_that_it_hides(encode):
    mask = torch.zeros(1, 40, 40)
    mask[:, :20] = 1.0
    assert len(encode(images(1, 40, 40), mask=mask, tiles=2, crop="pad").positive) == 1 + 2
    both = torch.cat([mask, torch.ones_like(mask)])
    assert len(encode(images(2, 40, 40), mask=both, tiles=2).positive) == 2 + 2 + 4


def test_refusals(pack, encode):
    for image, tiles, *words in (
        (images(1, 40, 40), 1, "image of 40 x 40 is one square", "2 or more"),
        (images(1, 4, 80), 4, "image of 80 x 4 into 320 tiles", "at most 64"),
    ):
        with pytest.raises(pack.core.AdapterError) as error:
            encode(image, tiles=tiles)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_another_weight_does_not_run_the_encoder(encode, world, runs):
    plus = world.new_adapter(world.model, kind="plus", name="plus")
    image, mask, unwanted = images(2), torch.ones(1, 8, 8), images(seed=92)
    for adapter in (world.adapter, plus):
        options = {"adapter": adapter, "mask": mask, "image_negative": unwanted}
        first = encode(image, **options)
        runs.clear()
        second = encode(image, weight=0.4, **options)
        assert not runs and second.positive.image is first.positive.image
        assert second.positive.weights == (0.4, 0.4)
    encode(image, adapter=plus)
    runs.clear()
    encode(image, adapter=plus, weight=0.3, combine="average")  # the negative of training comes from the memo too
    assert not runs


def test_what_the_encoder_would_see_otherwise_runs_it(encode, runs):
    image = images()
    encode(image)
    for options in ({"crop": "pad"}, {"mask": torch.ones(1, 8, 8)}, {"tiles": 1}):
        runs.clear()
        encode(image, **options)
        assert runs, options
    runs.clear()
    encode(image.clone())
    assert runs == [1]


def test_another_adapter_is_still_checked(pack, world, encode):
    image = images()
    encode(image)
    spec = pack.core.new_spec("base", [s.dim for s in sites(pack, world)], 64, image_dim=52, num_tokens=4)
    other = pack.types.manage("wide.safetensors", pack.core.IPAdapter(spec).eval())
    with pytest.raises(pack.core.AdapterError, match=r"image_embeds of 48; wide.safetensors takes"):
        encode(image, adapter=other)


def sites(pack, world):
    return pack.core.cross_attention_sites(world.model.get_model_object("diffusion_model"))


def test_nothing_outlives_the_image_nor_the_encoder(pack, world, encode, encoder):
    image, mask = images(), torch.ones(1, 8, 8)
    features = weakref.ref(encode(image, mask=mask).positive.image)
    assert features() is not None  # as long as image, mask and encoder live
    del mask
    gc.collect()
    assert features() is None
    features = weakref.ref(encode(image).positive.image)
    del image
    gc.collect()
    assert features() is None
    other = copy.deepcopy(encoder)
    image = images()
    features = weakref.ref(pack.EncodeImagePrompt.execute(world.adapter, other, image).args[0].positive.image)
    assert features() is not None
    del other
    gc.collect()
    assert features() is None


def test_many_images_are_encoded_a_few_at_a_time(encode, encoder, runs):
    image = images(40)
    prompt = encode(image)
    assert runs == [16, 16, 8] and len(prompt.positive) == 40
    alone = torch.cat([encode(one[None].clone()).positive.image for one in image[[0, 17, 39]]])
    torch.testing.assert_close(prompt.positive.image[[0, 17, 39]], alone, atol=1e-4, rtol=1e-4)


def test_it_can_be_interrupted(encode, runs):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        encode(images(40))
    assert not runs
    image = images(40)
    assert len(encode(image).positive) == 40  # and nothing half-made is remembered


def test_in_a_graph_too(pack, world, encoder, runs, monkeypatch):
    """ComfyUI's executor hands the very same image to the node again when only its weight changed."""
    import execution

    import nodes

    class Given:
        RETURN_TYPES, FUNCTION, CATEGORY = ("IP_ADAPTER_MODEL", "CLIP_VISION"), "give", "test"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def give(self):
            return world.adapter, encoder

    class Kept:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "test", True
        INPUT_TYPES = classmethod(lambda cls: {"required": {"image_prompt": ("IMAGE_PROMPT",)}})

        def keep(self, image_prompt):
            kept.append(image_prompt)
            return ()

    kept = []
    for name, cls in (("Given", Given), ("Kept", Kept), ("EncodeImagePrompt", pack.EncodeImagePrompt)):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, cls)

    class Host:
        client_id = last_node_id = last_prompt_id = None

        def send_sync(self, *args):
            pass

    known = inspect.signature(execution.PromptExecutor).parameters
    cache = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in known else {}
    executor = execution.PromptExecutor(Host(), **cache)
    for weight in (1.0, 0.5):
        inputs = {"ip_adapter": ["1", 0], "clip_vision": ["1", 1], "image": ["2", 0], "weight": weight}
        graph = {
            "1": {"class_type": "Given", "inputs": {}},
            "2": {"class_type": "EmptyImage", "inputs": {"width": 40, "height": 40, "batch_size": 2, "color": 9000}},
            "3": {"class_type": "EncodeImagePrompt", "inputs": inputs},
            "4": {"class_type": "Kept", "inputs": {"image_prompt": ["3", 0]}},
        }
        executor.execute(graph, "prompt", {}, ["4"])
        assert executor.success, executor.status_messages
    assert [prompt.positive.weights for prompt in kept] == [(1.0, 1.0), (0.5, 0.5)]
    assert runs == [2]
