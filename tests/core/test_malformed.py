"""Every tensor of every kind of adapter, damaged in every way: it loads or AdapterError says why not."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ipadapter_core as ic
from ipadapter_core.tensors import check_weights

State = dict[str, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "plus": {"depth": 2, "dim_head": 4, "resampler_dim": 8},
    "full": {},
    "faceid": {"face_dim": 12, "lora_rank": 2},
    "faceid-plus": {"face_dim": 12, "lora_rank": 2, "depth": 1, "dim_head": 4},
    "portrait": {"face_dim": 12},
}


def state_of(kind: str) -> tuple[State, dict[str, str]]:
    """A random adapter of three layers, and its metadata."""
    torch.manual_seed(0)
    spec = ic.new_spec(kind, [8, 16, 24], 24, image_dim=20, **KINDS[kind])
    adapter = ic.IPAdapter(spec)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    return {key: tensor.detach() for key, tensor in ic.export_state(adapter).items()}, ic.spec_metadata(spec)


def put(change: Callable[[Tensor], Tensor]) -> Callable[[State, str], State]:
    return lambda state, key: {**state, key: change(state[key])}


def rename(change: Callable[[str], str]) -> Callable[[State, str], State]:
    return lambda state, key: {change(k) if k == key else k: t for k, t in state.items()}


DAMAGES: dict[str, Callable[[State, str], State]] = {
    "dropped": lambda state, key: {k: t for k, t in state.items() if k != key},
    "scalar": put(lambda t: t.flatten()[0]),
    "vector": put(torch.flatten),
    "one value": put(lambda t: t.flatten()[:1]),
    "empty": put(lambda t: t[:0]),
    "no columns": put(lambda t: t[..., :0]),
    "transposed": put(lambda t: t.T.contiguous() if t.ndim == 2 else t[None]),
    "a row less": put(lambda t: t[1:].clone()),
    "a column less": put(lambda t: t[..., 1:].clone()),
    "doubled": put(lambda t: torch.cat([t, t])),
    "a dimension more": put(lambda t: t[..., None]),
    "nan": put(lambda t: t.clone().index_fill_(0, torch.tensor(0), float("nan"))),
    "infinite": put(lambda t: t / 0),
    "integers": put(lambda t: t.to(torch.int32)),
    "booleans": put(lambda t: t > 0),
    "complex": put(lambda t: t.to(torch.complex64)),
    "float8": put(lambda t: t.to(torch.float8_e4m3fn)),
    "another number": rename(lambda k: k.replace(".0.", ".999999999.").replace(".1.", ".999999999.")),
    "no number": rename(lambda k: k.replace(".0.", ".x.").replace(".1.", ".x.")),
    "a long number": rename(lambda k: k.replace(".0.", f".{'9' * 5000}.").replace(".1.", f".{'9' * 5000}.")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_tensor_is_an_adapter_error_or_no_harm(kind: str, damage: str) -> None:
    state, metadata = state_of(kind)
    refused = 0
    for key in state:
        damaged = DAMAGES[damage](state, key)
        if damaged.keys() == state.keys() and all(damaged[k] is state[k] for k in state):
            continue  # such as a number in a key that has none: the file is whole, as in the tests below
        for says in (metadata, {}):
            try:
                adapter = ic.adapter_from_checkpoint(ic.checkpoint_from_state(damaged, metadata=says, path="a.bin"))
            except ic.AdapterError as error:
                refused += 1
                assert str(error).startswith("a.bin: ")
            else:
                assert all(p.isfinite().all() for p in adapter.parameters())
    assert refused  # no damage that goes unnoticed everywhere


@pytest.mark.parametrize("kind", KINDS)
def test_several_damages_at_once(kind: str) -> None:
    state, metadata = state_of(kind)
    generator = random.Random(0)
    for _ in range(200):
        damaged = state
        says = {k: generator.choice(["", "0", "-1", "²", "9" * 5000, "x", v]) for k, v in metadata.items()}
        try:
            for _ in range(generator.randint(1, 3)):
                damaged = DAMAGES[generator.choice(list(DAMAGES))](damaged, generator.choice(list(damaged)))
        except (IndexError, RuntimeError):  # a damage cannot be done to what another one left
            continue
        with contextlib.suppress(ic.AdapterError):
            ic.adapter_from_checkpoint(ic.checkpoint_from_state(damaged, metadata=generator.choice([says, {}])))


def test_a_matrix_of_zeros_is_a_broken_download(tmp_path: Path) -> None:
    """The tail of a file that was allocated, but not written to its end."""
    for kind in KINDS:
        state, metadata = state_of(kind)
        path = tmp_path / f"{kind}.safetensors"
        save_file(state, path, metadata=metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
        with pytest.raises(ic.AdapterError, match=rf"{path.name}: all \d+ values of the tensor .* are zero.*again"):
            ic.load_adapter(path)


def test_zeros_that_are_no_damage_are_loaded() -> None:
    """Biases, and the half of a LoRA that starts at zero."""
    for kind in KINDS:
        state, metadata = state_of(kind)
        harmless = {k: t.zero_() if t.ndim == 1 or "lora.up" in k else t for k, t in state.items()}
        ic.adapter_from_checkpoint(ic.checkpoint_from_state(harmless, metadata=metadata))


def test_the_weights_of_any_model_are_checked() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 5))
    torch.nn.init.zeros_(model[2].bias)
    check_weights(model.state_dict(), "encoder.safetensors")
    check_weights(model.half().state_dict(), "encoder.safetensors")
    check_weights({k: t.to(torch.float8_e4m3fn) for k, t in model.state_dict().items()}, "encoder.safetensors")
    model[1].bias.data[2] = float("nan")
    with pytest.raises(ic.AdapterError, match=r"encoder.safetensors: the tensor 1.bias holds NaN"):
        check_weights(model.state_dict(), "encoder.safetensors")
    model[1].bias.data[2] = 0
    torch.nn.init.zeros_(model[2].weight)
    with pytest.raises(ic.AdapterError, match=r"encoder.safetensors: all 20 values of the tensor 2.weight are zero"):
        check_weights(model.state_dict(), "encoder.safetensors")


# Which names come before the key's parts: the first, the second and the last one.
WRAPPED = [
    ("module.", "", ""),
    ("_orig_mod.", "", ""),
    ("_orig_mod.module.", "", ""),
    ("state_dict.module._orig_mod.", "", ""),
    ("", "module.", ""),
    ("", "_orig_mod.", ""),
    ("module.", "_orig_mod.module.", ""),
    ("", "", "_orig_mod."),
    ("module.", "_orig_mod.", "_orig_mod."),
]


def wrapped(key: str, wrappers: tuple[str, str, str]) -> str:
    part, *middle, last = key.split(".")
    return wrappers[0] + ".".join([part, *(wrappers[1] + name for name in middle[:1]), *middle[1:], wrappers[2] + last])


@pytest.mark.parametrize("names", [("image_proj", "ip_adapter"), ("image_proj_model", "adapter_modules")])
@pytest.mark.parametrize("wrappers", WRAPPED)
@pytest.mark.parametrize("kind", ["base", "plus", "faceid-plus"])
def test_names_of_wrappers_are_dropped_wherever_they_are(
    kind: str, wrappers: tuple[str, str, str], names: tuple[str, str]
) -> None:
    """torch.compile writes `_orig_mod.`, DDP `module.`."""
    state, metadata = state_of(kind)
    renamed = {
        k.replace("image_proj.", f"{names[0]}.").replace("ip_adapter.", f"{names[1]}."): t for k, t in state.items()
    }
    checkpoint = ic.checkpoint_from_state({wrapped(k, wrappers): t for k, t in renamed.items()}, metadata=metadata)
    found = ic.export_state(ic.adapter_from_checkpoint(checkpoint))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_two_names_of_one_tensor_are_named() -> None:
    state, _ = state_of("base")
    with pytest.raises(ic.AdapterError, match=r"image_proj.norm.bias and image_proj._orig_mod.norm.bias are the same"):
        ic.checkpoint_from_state(state | {"image_proj._orig_mod.norm.bias": state["image_proj.norm.bias"]})
