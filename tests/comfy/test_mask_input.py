"""A mask that cannot be one is refused when it is connected, not while sampling."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (0, 16, 16), (1, 2, 16, 16), (16,), (1, 0, 16)])
def test_refused(pack, world, shape):
    with pytest.raises(pack.core.AdapterError, match="Connect a MASK") as error:
        world.apply(world.model, world.adapter, world.prompt, attn_mask=torch.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 16), (1, 1, 16, 16), (2, 1, 16, 16)])
def test_accepted(world, shape):
    mask = torch.ones(shape)
    mask[..., :8] = 0.0
    patched = world.apply(world.model, world.adapter, world.prompt, attn_mask=mask)
    want = world.apply(world.model, world.adapter, world.prompt, attn_mask=mask.reshape(-1, 16, 16)[:1])
    torch.testing.assert_close(world.sample(patched, steps=1), world.sample(want, steps=1), atol=1e-4, rtol=1e-4)
