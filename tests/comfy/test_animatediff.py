"""AnimateDiff-Evolved's own sampling, with its windows over the frames, named by ANIMATEDIFF_PATH.

Its motion modules have SD1.5's real widths, which no test model has; without them every frame is sampled on its own, so
the frames of one run can be compared with single images.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FRAMES, WINDOW = 6, 3


@pytest.fixture(scope="module")
def animatediff(comfyui: Path) -> ModuleType:
    path = os.environ.get("ANIMATEDIFF_PATH", "")
    if not path:
        pytest.skip("ANIMATEDIFF_PATH is not set: these tests need a checkout of ComfyUI-AnimateDiff-Evolved")
    name = "animatediff_evolved"
    spec = importlib.util.spec_from_file_location(name, Path(path) / "__init__.py", submodule_search_locations=[path])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def in_windows(animatediff, world):
    """Sample all frames, WINDOW at a time."""
    nodes = animatediff.NODE_CLASS_MAPPINGS
    (context,) = nodes["ADE_StandardStaticContextOptions"]().create_options(WINDOW, 1, fuse_method="flat")

    def sample(model, frames=FRAMES):
        evolved = nodes["ADE_UseEvolvedSampling"]().use_evolved_sampling(
            model, "use existing", context_options=context
        )[0]
        return world.sample(evolved, batch=frames)

    return sample


def test_masks_follow_their_frames(world, in_windows):
    masks = torch.zeros(FRAMES, 16, 16)
    masks[1::2] = 1.0
    got = in_windows(world.apply(world.model, world.adapter, world.prompt, attn_mask=masks))
    base, plain = in_windows(world.model), in_windows(world.apply(world.model, world.adapter, world.prompt))
    for frame in range(FRAMES):
        want = (plain if frame % 2 else base)[frame]
        torch.testing.assert_close(got[frame], want, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(base, plain, atol=0.05)


@pytest.mark.parametrize("images", [FRAMES, 2])
def test_each_frame_has_its_image(pack, world, in_windows, images):
    """The last image is for all frames that are left."""
    import dataclasses

    prompt = dataclasses.replace(world.new_prompt(world.adapter, seed=81, images=images), one_each=True)
    got = in_windows(world.apply(world.model, world.adapter, prompt))
    for frame in range(FRAMES):
        image = min(frame, images - 1)
        features = prompt.positive.image[image, None]
        single = dataclasses.replace(world.prompt, positive=pack.types.EncodedImages(features))
        want = in_windows(world.apply(world.model, world.adapter, single))
        torch.testing.assert_close(got[frame], want[frame], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(got, in_windows(world.apply(world.model, world.adapter, world.prompt)), atol=0.05)


def test_each_frame_has_its_weight(pack, world, in_windows):
    made = pack.WeightSchedule.execute("frames", "0, 1", "linear").args[0]
    got = in_windows(world.apply(world.model, world.adapter, world.prompt, weight_schedule=made))
    for frame in range(FRAMES):
        single = world.apply(world.model, world.adapter, world.prompt, weight=frame / (FRAMES - 1))
        torch.testing.assert_close(got[frame], in_windows(single)[frame], atol=2e-3, rtol=2e-3)


def test_a_map_of_all_frames(pack, world, in_windows):
    masks = torch.zeros(FRAMES, 16, 16)
    masks[1::2] = 1.0
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=masks)
    model, record = pack.RecordAttentionMap.execute(patched).args
    assert torch.equal(in_windows(model), in_windows(patched))
    acted = record.heat("all", 0, 10000).flatten(1).amax(1)
    assert [bool(most) for most in acted] == [False, True] * (FRAMES // 2)
