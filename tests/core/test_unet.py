"""Inside diffusers: three implementations agree, and the UNet is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ipadapter_core as ic
from ipadapter_core.attn_processor import ImageAttnProcessor

Pairs = Sequence[ic.KeyValue]
BOTH = (0, 1)  # an image prompt for each row of a batch of two


class HandProcessor:
    """The equation of the paper written out: softmax(QK'/sqrt d)V + weight * softmax(QK_i'/sqrt d)V_i."""

    def __init__(self, pair: ic.KeyValue | None, weight: float = 1.0, masks: dict[int, Tensor] | None = None) -> None:
        self.pair, self.weight, self.masks = pair, weight, masks

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states)
        out = self.attend(query, attn.to_k(context), attn.to_v(context), attn.heads)
        if self.pair is not None:
            mask = 1.0 if self.masks is None else self.masks[query.shape[1]]
            out = out + self.weight * mask * self.attend(query, *self.pair, attn.heads)
        return attn.to_out[0](out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
        scores = torch.einsum("bnhd,bthd->bhnt", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), v).flatten(2)


@torch.no_grad()
def run(unet: Any, latents: Tensor, text: Tensor, **kwargs: Any) -> Tensor:
    return unet(latents, 500, encoder_hidden_states=text, **kwargs).sample


def run_by_hand(unet: Any, pairs: Pairs, latents: Tensor, text: Tensor, **kwargs: Any) -> Tensor:
    before = dict(unet.attn_processors)
    cross = iter(pairs)  # registration order is id order
    hand = {n: HandProcessor(next(cross) if ".attn2." in n else None, **kwargs) for n in before}
    unet.set_attn_processor(dict(hand))
    out = run(unet, latents, text)
    unet.set_attn_processor(before)
    return out


def state_for_diffusers(adapter: ic.IPAdapter) -> dict[str, dict[str, Tensor]]:
    return {
        "image_proj": dict(adapter.projector.state_dict()),
        "ip_adapter": dict(adapter.layers.state_dict()),
    }


def run_in_diffusers(
    unet: Any, adapter: ic.IPAdapter, given: Tensor, latents: Tensor, text: Tensor, weight: float
) -> Tensor:
    unet._load_ip_adapter_weights([state_for_diffusers(adapter)], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [weight]
    return run(unet, latents, text, added_cond_kwargs={"image_embeds": [given.unsqueeze(1)]})


def run_injected(unet: Any, pairs: Pairs | None, latents: Tensor, text: Tensor, **application: Any) -> Tensor:
    """With an image prompt for each row of the batch, unless `rows` says otherwise."""
    application.setdefault("rows", range(len(latents)) if pairs and len(pairs[0].key) > 1 else None)
    with ic.inject(unet, ic.AdapterApplication(pairs, **application)):
        return run(unet, latents, text)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_three_way_parity(
    new_unet: Any, layout: str, kind: str, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    unet = new_unet(layout).requires_grad_(False)
    adapter = new_adapter(unet, kind)
    (given,) = features(adapter)
    pairs = adapter(given)
    ours = run_injected(unet, pairs, latents, text, weight=0.7)
    by_hand = run_by_hand(unet, pairs, latents, text, weight=0.7)
    plain = run(unet, latents, text)
    theirs = run_in_diffusers(unet, adapter, given, latents, text, 0.7)
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert apart(ours, plain) > 1e-2  # the image matters, so the equality above means something


def test_parity_sees_swapped_keys_and_layers(
    unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    """The oracle is not blind: each of these mistakes must show."""
    adapter = new_adapter(unet)
    pairs = list(adapter(*features(adapter)))
    right = run_by_hand(unet, pairs, latents, text)
    same = [i for i in range(1, len(pairs)) if pairs[i].key.shape == pairs[i - 1].key.shape]
    wrongs = {"K and V swapped": [ic.KeyValue(v, k) for k, v in pairs]}
    wrongs["K and V swapped in the last layer"] = [*pairs[:-1], ic.KeyValue(pairs[-1].value, pairs[-1].key)]
    for i in (same[0], same[-1]):
        wrongs[f"layers {i - 1} and {i} swapped"] = [*pairs[: i - 1], pairs[i], pairs[i - 1], *pairs[i + 1 :]]
    for name, wrong in wrongs.items():
        assert apart(run_injected(unet, wrong, latents, text), right) > 1e-4, name
    torch.testing.assert_close(run_injected(unet, pairs, latents, text), right, atol=1e-5, rtol=1e-5)


def test_every_layer_is_used(unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor) -> None:
    """Zeroing the values of any one layer changes the output, the middle block (last ids) included."""
    adapter = new_adapter(unet)
    pairs = list(adapter(*features(adapter)))
    whole = run_injected(unet, pairs, latents, text)
    for i in (0, 1, len(pairs) // 2, len(pairs) - 1):
        without = [*pairs[:i], ic.KeyValue(pairs[i].key, 0 * pairs[i].value), *pairs[i + 1 :]]
        assert apart(run_injected(unet, without, latents, text), whole) > 1e-6, i


def test_eject_leaves_the_unet_as_it_was(
    unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    adapter = new_adapter(unet, "faceid")
    pairs = adapter(*features(adapter))
    before, text_before, out_before = dict(unet.attn_processors), repr(unet), run(unet, latents, text)
    for _ in range(2):
        run_injected(unet, pairs, latents, text, lora=adapter.lora)
        after = unet.attn_processors
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)
        assert repr(unet) == text_before
        assert torch.equal(run(unet, latents, text), out_before)
        assert not unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match=r"boom"), ic.inject(unet, ic.AdapterApplication(pairs)):
        raise RuntimeError("boom")
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_weight_zero_is_the_plain_unet_bit_by_bit(
    unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    adapter = new_adapter(unet)
    pairs = adapter(*features(adapter))
    plain = run(unet, latents, text)
    assert torch.equal(run_injected(unet, pairs, latents, text, weight=0.0), plain)
    assert torch.equal(run_injected(unet, pairs, latents, text, weight=[0.0] * len(pairs)), plain)
    with ic.inject(unet, ic.AdapterApplication()):  # no key_values yet
        assert torch.equal(run(unet, latents, text), plain)


@pytest.fixture
def sd15(unets: Any) -> Any:
    return unets["sd15"]


@pytest.fixture
def case(sd15: Any, new_adapter: Any, features: Any) -> tuple[ic.IPAdapter, Pairs]:
    adapter = new_adapter(sd15)
    return adapter, adapter(*features(adapter))


def test_nested_injections(
    sd15: Any, case: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    _, pairs = case
    other = new_adapter(sd15, seed=9)
    more = other(*features(other, seed=10))
    before = dict(sd15.attn_processors)
    one, two = (
        ic.AdapterApplication(given, weight, name=name, rows=BOTH)
        for given, weight, name in ((pairs, 0.5, "one"), (more, 0.8, "two"))
    )
    with ic.inject(sd15, [one, two]):
        together = run(sd15, latents, text)
    first = ic.inject(sd15, one)
    alone, middle = run(sd15, latents, text), dict(sd15.attn_processors)
    second = ic.inject(sd15, two)
    torch.testing.assert_close(run(sd15, latents, text), together, atol=1e-6, rtol=1e-6)
    with pytest.raises(ic.AdapterError, match=r"Injection\(one\) cannot be ejected: Injection\(two\)"):
        first.eject()
    second.eject()
    assert all(sd15.attn_processors[name] is middle[name] for name in middle)
    assert torch.equal(run(sd15, latents, text), alone)
    first.eject()
    first.eject()  # nothing left to do
    assert all(sd15.attn_processors[name] is before[name] for name in before)


def test_over_diffusers_own_adapter(
    new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    """Stacked on an adapter that diffusers loaded, ours adds its term; ejected, theirs is untouched."""
    unet = new_unet("sd15").requires_grad_(False)
    theirs, ours = new_adapter(unet), new_adapter(unet, seed=8)
    (given,) = features(theirs)
    both = [ic.AdapterApplication(adapter(given), rows=BOTH) for adapter in (theirs, ours)]
    with ic.inject(unet, both):
        expected = run(unet, latents, text)
    run_in_diffusers(unet, theirs, given, latents, text, 1.0)
    before = dict(unet.attn_processors)
    extra = {"added_cond_kwargs": {"image_embeds": [given.unsqueeze(1)]}}
    with ic.inject(unet, both[1]):
        torch.testing.assert_close(run(unet, latents, text, **extra), expected, atol=1e-5, rtol=1e-5)
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_cached_keys_equal_fresh_ones(sd15: Any, case: Any, features: Any, latents: Tensor, text: Tensor) -> None:
    adapter, cached = case
    application = ic.AdapterApplication(cached, rows=BOTH)
    with ic.inject(sd15, application):
        for step in range(3):
            x = latents * (1 + step)
            application.key_values = cached
            kept = run(sd15, x, text)
            application.key_values = adapter(*features(adapter))
            assert torch.equal(run(sd15, x, text), kept)


def test_several_images(sd15: Any, case: Any, features: Any, latents: Tensor, text: Tensor) -> None:
    """Concatenated tokens share one softmax."""
    adapter, one = case
    tokens = adapter.encode(*features(adapter))
    twice = adapter.keys_values(torch.cat([tokens, tokens], dim=1))
    expected = run_injected(sd15, one, latents, text)
    torch.testing.assert_close(run_injected(sd15, twice, latents, text), expected, atol=1e-5, rtol=1e-5)
    other = adapter.encode(*features(adapter, seed=11))
    both = adapter.keys_values(torch.cat([tokens, other], dim=1))
    by_hand = run_by_hand(sd15, both, latents, text)
    torch.testing.assert_close(run_injected(sd15, both, latents, text), by_hand, atol=1e-5, rtol=1e-5)


def test_rows_and_roles(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    _, pairs = case
    negative, positive = ([ic.KeyValue(k[i : i + 1], v[i : i + 1]) for k, v in pairs] for i in (0, 1))
    x, states = latents.repeat(2, 1, 1, 1), text.repeat(2, 1, 1)
    roles = run_injected(sd15, pairs, x, states, rows=[0, 0, 1, 1])
    torch.testing.assert_close(roles[:2], run_injected(sd15, negative, latents, text), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(roles[2:], run_injected(sd15, positive, latents, text), atol=1e-5, rtol=1e-5)


def test_rows_are_never_guessed(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    """Two image prompts and a batch of two: [negative, positive], or two generated images? The caller has to say."""
    _, pairs = case
    for batch in (1, 2, 4):
        x, states = latents[:1].repeat(batch, 1, 1, 1), text[:1].repeat(batch, 1, 1)
        with pytest.raises(ic.AdapterError, match=rf"face: 2 rows of image keys.*each of the {batch} rows"):
            run_injected(sd15, pairs, x, states, name="face", rows=None)
    with pytest.raises(ic.AdapterError, match=r"face: the rows are \[0, 1\]; expected 4 numbers below 2"):
        run_injected(sd15, pairs, x, states, name="face", rows=[0, 1])
    with pytest.raises(ic.AdapterError, match=r"face: the rows are \[0, 2\]; expected 2 numbers below 2"):
        run_injected(sd15, pairs, latents, text, name="face", rows=[0, 2])
    for wrong in ([-1, 1], [0.0, 1.0], ["0", "1"], []):
        with pytest.raises(ic.AdapterError, match=r"whole numbers from 0 on"):
            run_injected(sd15, pairs, latents, text, rows=wrong)
    swapped = run_injected(sd15, pairs, latents, text, rows=[1, 0])
    assert torch.equal(run_injected(sd15, pairs, latents, text, rows=torch.tensor([1, 0])), swapped)
    rows = [0, 1]
    with ic.inject(sd15, ic.AdapterApplication(pairs, rows=rows)):
        run(sd15, latents, text)
        rows.reverse()
        assert torch.equal(run(sd15, latents, text), swapped)
    told = {"added_cond_kwargs": {"image_embeds": [torch.tensor([1, 0]).reshape(2, 1, 1)]}}
    with (
        pytest.raises(ic.AdapterError, match=r"rows are \[0, 1\], and pipeline_rows makes them \[1, 0\]"),
        ic.inject(sd15, ic.AdapterApplication(pairs, rows=[0, 1])),
    ):
        run(sd15, latents, text, **told)


def test_weights_and_masks_of_each_row(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    """One for all or one for each row of the batch; anything else is named with both numbers."""
    pairs = [ic.KeyValue(k[:1], v[:1]) for k, v in case[1]]
    x, states = latents.repeat(2, 1, 1, 1), text.repeat(2, 1, 1)
    with pytest.raises(ic.AdapterError, match=r"2 weights for 4 rows of the UNet's batch, those of guidance included"):
        run_injected(sd15, pairs, x, states, weight=torch.tensor([0.5, 1.0]))
    with pytest.raises(ic.AdapterError, match=r"2 masks for 4 rows"):
        run_injected(sd15, pairs, x, states, mask=torch.ones(2, 8, 8))


def test_weights_per_layer_and_per_row(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    _, pairs = case
    weights = [0.1 * i for i in range(len(pairs))]
    scaled = [ic.KeyValue(k, w * v) for (k, v), w in zip(pairs, weights, strict=True)]
    expected = run_injected(sd15, scaled, latents, text)
    torch.testing.assert_close(run_injected(sd15, pairs, latents, text, weight=weights), expected, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([0.0, 0.5])
    out = run_injected(sd15, pairs, latents, text, weight=rows)
    torch.testing.assert_close(out[0], run(sd15, latents, text)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], run_injected(sd15, pairs, latents, text, weight=0.5)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (10, 14)])
def test_mask_on_the_true_grid(sd15: Any, case: Any, text: Tensor, size: tuple[int, int]) -> None:
    _, pairs = case
    x = torch.randn(2, 4, *size)
    h, w = size
    soft = torch.rand(1, 20, 30)
    grids = [(h, w)]
    while len(grids) < 4:
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    masks = {a * b: ic.resize_mask(soft, (a, b)) for a, b in grids}
    expected, unmasked = run_by_hand(sd15, pairs, x, text, masks=masks), run_by_hand(sd15, pairs, x, text)
    application = ic.AdapterApplication(pairs, mask=soft, rows=BOTH)
    with ic.inject(sd15, application):
        torch.testing.assert_close(run(sd15, x, text), expected, atol=1e-5, rtol=1e-5)
        application.mask = torch.ones(3, 3)  # another mask takes effect at once
        torch.testing.assert_close(run(sd15, x, text), unmasked, atol=1e-5, rtol=1e-5)
        application.mask = torch.full((3, 3), 1.2)  # as resampling leaves it
        torch.testing.assert_close(run(sd15, x, text), unmasked, atol=1e-5, rtol=1e-5)


def test_an_observer_sees_both_attentions(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    """Its two tensors, summed and projected by hand, are what the layer returned; the output is as without it."""
    _, pairs = case
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    returned: dict[int, Tensor] = {}
    ids = {name: i for i, name in enumerate(sd15.attn_processors)}
    cross = {ids[f"{name}.processor"]: module for name, module in sd15.named_modules() if name.endswith(".attn2")}
    hooks = [
        module.register_forward_hook(lambda m, args, out, id=id: returned.update({id: out}))
        for id, module in cross.items()
    ]
    plain = run_injected(sd15, pairs, latents, text, weight=0.5)
    application = ic.AdapterApplication(pairs, 0.5, rows=BOTH, observe=lambda id, a, b: seen.update({id: (a, b)}))
    with ic.inject(sd15, application):
        assert torch.equal(run(sd15, latents, text), plain)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == [2 * i + 1 for i in range(len(pairs))] == sorted(cross)
    for id, (text_attention, image_attention) in seen.items():
        expected = cross[id].to_out[0](text_attention + image_attention)
        torch.testing.assert_close(returned[id], expected, atol=1e-6, rtol=1e-5)
        assert image_attention.abs().max() > 0
    seen.clear()
    application.weight = 0.0
    with ic.inject(sd15, application):
        run(sd15, latents, text)
    assert not seen


def test_lora_equals_merged_weights(
    new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    unet, merged = (new_unet("sd15").requires_grad_(False) for _ in range(2))
    adapter = new_adapter(unet, "faceid")
    for parameter in adapter.lora.parameters():
        parameter.mul_(0.3)
    pairs = adapter(*features(adapter))
    for id, name in enumerate(merged.attn_processors):
        attention = merged.get_submodule(name.removesuffix(".processor"))
        for part in ("to_q", "to_k", "to_v", "to_out"):
            linear = attention.to_out[0] if part == "to_out" else getattr(attention, part)
            update = adapter.lora.part(id, part)
            linear.weight.add_(0.6 * update.up.weight @ update.down.weight)
    expected = run_injected(merged, pairs, latents, text)
    ours = run_injected(unet, pairs, latents, text, lora=adapter.lora, lora_weight=0.6)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert apart(ours, run_injected(unet, pairs, latents, text)) > 1e-3
    # Injected in two steps, the image attention of the first still sees the LoRA's query.
    with ic.inject(unet, ic.AdapterApplication(pairs, rows=BOTH)):
        stacked = run_injected(unet, None, latents, text, lora=adapter.lora, lora_weight=0.6)
    torch.testing.assert_close(stacked, expected, atol=1e-5, rtol=1e-4)


def slice_attention(unet: Any) -> None:
    unet.set_attention_slice("max")


def use_plain_processor(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def use_xformers(unet: Any) -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    unet.set_attn_processor(XFormersAttnProcessor())  # what enable_xformers_memory_efficient_attention does on a GPU


def fuse(unet: Any) -> None:
    unet.fuse_qkv_projections()


def load_another_adapter(unet: Any) -> None:
    sites = ic.diffusers_sites(unet)
    spec = ic.new_spec("base", [site.dim for site in sites], sites[0].cross_attention_dim, image_dim=20)
    unet._load_ip_adapter_weights([state_for_diffusers(ic.IPAdapter(spec))], low_cpu_mem_usage=False)


CHANGES = (slice_attention, use_plain_processor, use_xformers, fuse)


@pytest.mark.parametrize(
    ("kind", "change"),
    # With a LoRA in the self-attention, diffusers' own loader fails before it replaces anything.
    [("base", load_another_adapter), *((kind, change) for kind in ("base", "faceid") for change in CHANGES)],
)
def test_a_processor_that_replaces_ours_is_noticed(
    new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor, kind: str, change: Any
) -> None:
    """Before the first layer; and the block ends as always: nothing of ours is left, not even for later."""
    unet = new_unet("sd15").requires_grad_(False)
    adapter = new_adapter(unet, kind)
    application = ic.AdapterApplication(adapter(*features(adapter)), lora=adapter.lora, name="mine", rows=BOTH)
    before = dict(unet.attn_processors)
    for _ in range(2):
        with (
            pytest.raises(ic.AdapterError, match=r"Injection\(mine\): \w+Processor\w* took the place"),
            ic.inject(unet, application),
        ):
            change(unet)
            run(unet, latents, text)
        with ic.inject(unet, application):
            change(unet)  # and no forward pass after it
        assert not unet._forward_pre_hooks
        assert not any(isinstance(processor, ImageAttnProcessor) for processor in unet.attn_processors.values())
    if change is fuse:
        unet.unfuse_qkv_projections()
        assert all(type(processor).__name__ == "FusedAttnProcessor2_0" for processor in unet.attn_processors.values())
    unet.set_attn_processor(before)
    unet.encoder_hid_proj = None
    run_injected(unet, application.key_values, latents, text)
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_one_replaced_processor_is_enough(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    before = dict(sd15.attn_processors)
    name, foreign = "mid_block.attentions.0.transformer_blocks.0.attn2", AttnProcessor()
    one, two = (ic.AdapterApplication(case[1], name=name, rows=BOTH) for name in ("one", "two"))
    with (
        pytest.raises(ic.AdapterError, match=r"Injection\(one\): AttnProcessor took the place"),
        ic.inject(sd15, one),
        ic.inject(sd15, two),
    ):
        sd15.get_submodule(name).set_processor(foreign)
        run(sd15, latents, text)
    after = sd15.attn_processors
    assert after.pop(f"{name}.processor") is foreign
    assert all(after[name] is before[name] for name in after)
    sd15.set_attn_processor(before)


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_left_for_unfuse(new_unet: Any, case: Any, first: int) -> None:
    """fuse_qkv_projections keeps the processors it replaced, ours in both injections among them."""
    unet = new_unet("sd15").requires_grad_(False)
    before = dict(unet.attn_processors)
    injections = [ic.inject(unet, ic.AdapterApplication(case[1])) for _ in range(2)]
    unet.fuse_qkv_projections()
    injections[first].eject()
    injections[1 - first].eject()
    unet.unfuse_qkv_projections()
    assert all(unet.attn_processors[name] is before[name] for name in before)


@pytest.mark.parametrize("change", [slice_attention, use_plain_processor, fuse])
@pytest.mark.parametrize("kind", ["base", "faceid"])
def test_over_other_processors(
    new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor, kind: str, change: Any
) -> None:
    """Set before inject, they change nothing: with fused projections the LoRA reaches keys and values as well."""
    unet = new_unet("sd15").requires_grad_(False)
    adapter = new_adapter(unet, kind)
    if adapter.lora is not None:
        for parameter in adapter.lora.parameters():
            parameter.mul_(0.3)
    pairs = adapter(*features(adapter))
    expected = run_injected(unet, pairs, latents, text, lora=adapter.lora, lora_weight=0.6)
    change(unet)
    changed = dict(unet.attn_processors)
    out = run_injected(unet, pairs, latents, text, lora=adapter.lora, lora_weight=0.6)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert apart(out, run(unet, latents, text)) > 1e-3
    assert all(unet.attn_processors[name] is changed[name] for name in changed)


def test_a_compiled_unet(new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor) -> None:
    """The wrapper of torch.compile may be passed in place of the UNet, also after a run without adapter."""
    unet = new_unet("small").requires_grad_(False)
    adapter = new_adapter(unet)
    pairs = adapter(*features(adapter))
    plain, expected = run(unet, latents, text), run_injected(unet, pairs, latents, text)
    compiled = torch.compile(unet, backend="eager")
    run(compiled, latents, text)
    application = ic.AdapterApplication(pairs)
    told = {"added_cond_kwargs": {"image_embeds": [torch.tensor(BOTH).reshape(2, 1, 1)]}}
    with ic.inject(compiled, application):
        out = run(compiled, latents, text, **told)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(compiled, latents, text), plain, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_a_processor_that_cannot_carry_the_image_is_refused(
    new_unet: Any, case: Any, latents: Tensor, text: Tensor
) -> None:
    class WithoutQuery:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return attn.to_out[0](hidden_states)

    unet = new_unet("sd15").requires_grad_(False)
    unet.set_attn_processor(WithoutQuery())
    with pytest.raises(ic.AdapterError, match=r"WithoutQuery .*no image attention can be added"):
        run_injected(unet, case[1], latents, text)


def train_step(
    unet: Any, adapter: ic.IPAdapter, given: tuple[Tensor, ...], latents: Tensor, text: Tensor
) -> list[Tensor]:
    application = ic.AdapterApplication(lora=adapter.lora, rows=BOTH)
    with ic.inject(unet, application):
        application.key_values = adapter(*given)
        unet(latents, 500, encoder_hidden_states=text).sample.square().mean().backward()
    gradients = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    adapter.zero_grad(set_to_none=True)
    return gradients


def test_training_with_gradient_checkpointing(
    new_unet: Any, new_adapter: Any, features: Any, latents: Tensor, text: Tensor
) -> None:
    unet = new_unet("sd15").requires_grad_(False).train()
    adapter = new_adapter(unet, "faceid")
    for parameter in adapter.parameters():
        parameter.data.mul_(0.2)
    adapter.requires_grad_(True)
    given = features(adapter)
    plain = train_step(unet, adapter, given, latents, text)
    unet.enable_gradient_checkpointing()
    checkpointed = train_step(unet, adapter, given, latents, text)
    assert len(plain) == len(list(adapter.parameters()))  # every weight learns, LoRA and all layers included
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_call_leaves_no_tensor_to_the_garbage_collector(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    """A cycle would hold the queries of every layer, and a GPU's memory, until it runs."""
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is Tensor for thing in gc.get_objects())
        run_injected(sd15, case[1], latents, text)
        after = sum(type(thing) is Tensor for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def test_half_precision_unet(new_unet: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    """fp32 keys follow the queries of a bf16 UNet."""
    unet = new_unet("sd15").to(torch.bfloat16)
    expected = run_injected(new_unet("sd15"), case[1], latents, text)
    out = run_injected(unet, case[1], latents.bfloat16(), text.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.15, rtol=0.15)


def test_what_does_not_fit_is_refused_before_anything_changes(unets: Any, case: Any, new_adapter: Any) -> None:
    adapter, pairs = case
    before = dict(unets["sdxl"].attn_processors)
    face = new_adapter(unets["sd15"], "faceid")
    lora = face.lora
    for application, message in (
        (ic.AdapterApplication(pairs, name="sd15.bin"), "sd15.bin: has 16 layers, the UNet has 70"),
        (ic.AdapterApplication(weight=[1.0] * 3), "3 weights for 70 layers"),
        (ic.AdapterApplication(lora=lora), "LoRA has 32 layers, the UNet 140"),
        (ic.AdapterApplication(mask=torch.zeros(8, 8)), "mask is 0 everywhere"),
        (ic.AdapterApplication(mask=torch.full((8, 8), torch.nan)), "mask holds NaN"),
        (ic.AdapterApplication(weight=float("nan")), "weight is nan; expected a finite number"),
        (ic.AdapterApplication(weight=torch.tensor([1.0, torch.inf])), "expected a finite number"),
        (ic.AdapterApplication(weight="0.5"), "weight is '0.5'; expected a finite number"),
        (ic.AdapterApplication(mask=torch.full((2, 8, 8), 255.0)), "mask 1 of 2 has values from 255 to 255"),
    ):
        with pytest.raises(ic.AdapterError, match=message):
            ic.inject(unets["sdxl"], application)
    assert all(unets["sdxl"].attn_processors[name] is before[name] for name in before)
    with pytest.raises(ic.AdapterError, match=r"is made for"):
        ic.check_compatible(replace(adapter.spec, cross_attention_dim=99), ic.diffusers_sites(unets["sd15"]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", [1.0] * 3, "3 weights for 16 layers"),
        ("weight", [1.0] * 17, "17 weights for 16 layers"),
        ("weight", float("nan"), "weight is nan; expected a finite number"),
        ("mask", torch.zeros(8, 8), "mask is 0 everywhere"),
        ("mask", torch.full((8, 8), 255.0), "mask has values from 255 to 255"),
        ("mask", torch.ones(2, 8, 8), "2 masks for 4 rows"),
    ],
)
def test_what_is_set_between_calls_is_checked_as_well(
    sd15: Any, case: Any, latents: Tensor, text: Tensor, field: str, value: Any, message: str
) -> None:
    x, states = latents.repeat(2, 1, 1, 1), text.repeat(2, 1, 1)
    application = ic.AdapterApplication(case[1], rows=[0, 1, 0, 1])
    with ic.inject(sd15, application):
        run(sd15, x, states)
        setattr(application, field, value)
        with pytest.raises(ic.AdapterError, match=message):
            run(sd15, x, states)


def test_another_unet_and_another_injection_check_again(unets: Any, new_adapter: Any, features: Any) -> None:
    application = ic.AdapterApplication(weight=[1.0] * 16)
    ic.inject(unets["sd15"], application).eject()
    with pytest.raises(ic.AdapterError, match="16 weights for 70 layers"):
        ic.inject(unets["sdxl"], application)
    application.weight.append(1.0)
    with pytest.raises(ic.AdapterError, match="17 weights for 16 layers"):
        ic.inject(unets["sd15"], application)


def test_a_mask_with_one_channel_is_one_mask(sd15: Any, case: Any, latents: Tensor, text: Tensor) -> None:
    mask = torch.rand(8, 8)
    results = [run_injected(sd15, case[1], latents, text, mask=each) for each in (mask, mask[None, None])]
    assert torch.equal(*results)
