"""Loading without drawing numbers, saving whole or not at all, features in and tokens out."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ipadapter_core as ic
from ipadapter_core.spec import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path: Path, unets: Any, new_adapter: Any, features: Any, kind: ic.Kind) -> None:
    adapter = new_adapter(unets["sd15"], kind, **({"shortcut": True} if kind == "faceid-plus" else {}))
    path = tmp_path / "a.safetensors"
    ic.save_adapter(path, adapter, {"ipadapter.step": "7"})
    random_state = torch.get_rng_state()
    loaded = ic.load_adapter(path)
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing was initialised at random
    assert loaded.spec == adapter.spec and loaded.metadata["ipadapter.step"] == "7"
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    given = features(adapter)
    for ours, theirs in zip(loaded(*given), adapter(*given), strict=True):
        assert torch.equal(ours.key, theirs.key) and torch.equal(ours.value, theirs.value)
    assert list(tmp_path.iterdir()) == [path]


def test_key_order_does_not_matter(tmp_path: Path, unets: Any, new_adapter: Any, features: Any) -> None:
    adapter = new_adapter(unets["sdxl"], "plus")
    state = ic.export_state(adapter)
    keys = sorted(state)
    random.Random(1).shuffle(keys)
    torch.save({key: state[key] for key in keys}, tmp_path / "a.bin")
    expected, found = adapter(*features(adapter)), ic.load_adapter(tmp_path / "a.bin")(*features(adapter))
    assert all(
        torch.equal(a.key, b.key) and torch.equal(a.value, b.value) for a, b in zip(expected, found, strict=True)
    )


def test_dtype_is_the_files_unless_asked(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    path = tmp_path / "a.safetensors"
    ic.save_adapter(path, new_adapter(unets["sd15"]).half())
    assert {p.dtype for p in ic.load_adapter(path).parameters()} == {torch.float16}
    assert {p.dtype for p in ic.load_adapter(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    (tmp_path / "any-file").touch()
    ic.save_adapter(tmp_path / "a.safetensors", new_adapter(unets["sd15"]))
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any-file").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_leaves_the_old_file_and_no_half_file(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    import resource

    path = tmp_path / "a.safetensors"
    adapter = new_adapter(unets["sd15"])
    ic.save_adapter(path, adapter)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|I/O"):
            ic.save_adapter(path, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"])
    with pytest.raises(ic.AdapterError, match=r".bin"):
        ic.save_adapter(tmp_path / "a.bin", adapter)
    adapter.projector.norm.bias[0] = float("nan")
    with pytest.raises(ic.AdapterError, match=r"not saved, the tensor image_proj.norm.bias holds NaN"):
        ic.save_adapter(tmp_path / "a.safetensors", adapter)
    adapter.projector.norm.bias[0] = 0.0
    name = next(iter(adapter.layers.state_dict()))
    torch.nn.init.zeros_(adapter.layers.state_dict()[name])
    with pytest.raises(ic.AdapterError, match=rf"not saved, all \d+ values of the tensor ip_adapter.{name} are zero"):
        ic.save_adapter(tmp_path / "a.safetensors", adapter)
    assert not list(tmp_path.iterdir())


def test_the_header_holds_the_provenance(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"], "faceid-plus")
    adapter.projector.shortcut = True  # what a host's widget does
    ic.save_adapter(tmp_path / "a.safetensors", adapter)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata[ic.METADATA_KIND] == "faceid-plus" and metadata[ic.METADATA_SHORTCUT] == "true"
    assert metadata[ic.METADATA_BASE_FAMILY] == "context-24"


def test_other_metadata_cannot_contradict_the_tensors(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    path = tmp_path / "a.safetensors"
    ic.save_adapter(path, new_adapter(unets["sd15"]), {ic.METADATA_KIND: "plus", ic.METADATA_ENCODER: "mine"})
    assert (ic.load_adapter(path).spec.kind, ic.load_adapter(path).spec.encoder_id) == ("base", "mine")


def test_an_unknown_negative_is_refused(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    ic.save_adapter(tmp_path / "a.safetensors", new_adapter(unets["sd15"]), {ic.METADATA_NEGATIVE: "balck"})
    with pytest.raises(ic.AdapterError, match=r"ipadapter.negative='balck'; expected 'zeros' or 'black'"):
        ic.load_adapter(tmp_path / "a.safetensors")


def test_faceid_plus_does_not_guess_its_version(tmp_path: Path, unets: Any, new_adapter: Any, features: Any) -> None:
    adapter = new_adapter(unets["sd15"], "faceid-plus")
    path = tmp_path / "a.safetensors"
    ic.save_adapter(path, adapter)
    given = features(adapter)
    with pytest.raises(ic.AdapterError, match=r"shortcut=True"):
        ic.load_adapter(path).encode(*given)
    v1, v2 = (ic.load_adapter(path, shortcut=version).encode(*given) for version in (False, True))
    assert (v1 - v2).abs().max() > 1e-2
    ic.save_adapter(path, new_adapter(unets["sd15"], "base"))
    with pytest.raises(ic.AdapterError, match=r"base adapter"):
        ic.load_adapter(path, shortcut=True)


@pytest.mark.parametrize(
    ("kind", "needs_image"), [("base", 0), ("faceid", 0), ("portrait", 0), ("plus", 1), ("full", 1)]
)
def test_negative_tokens(unets: Any, new_adapter: Any, kind: str, needs_image: int) -> None:
    adapter = new_adapter(unets["sd15"], kind)
    if needs_image:
        with pytest.raises(ic.AdapterError, match=r"pixel_values are zeros"):
            adapter.negative_tokens()
        encoded = torch.randn(1, 9, 20)
        assert torch.equal(adapter.negative_tokens(encoded), adapter.encode(encoded))
    else:
        width = adapter.spec.image_dim or adapter.spec.face_dim
        tokens = adapter.negative_tokens()
        assert torch.equal(tokens, adapter.encode(torch.zeros(1, width)))
        assert tokens.abs().max() > 0  # biases and LayerNorm: not zero tokens


def test_negative_tokens_of_faceid_plus(unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"], "faceid-plus", shortcut=True)
    with pytest.raises(ic.AdapterError, match=r"pixel_values are zeros"):
        adapter.negative_tokens()
    encoded = torch.randn(2, 9, 20)
    assert torch.equal(adapter.negative_tokens(encoded), adapter.encode(torch.zeros(2, 12), encoded))


def test_wrong_features_are_named(unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"], "plus")
    with pytest.raises(ic.AdapterError, match=r"1280 wide.*takes 20"):
        adapter.encode(torch.zeros(1, 9, 1280))
    with pytest.raises(ic.AdapterError, match=r"penultimate hidden states, not its image_embeds"):
        adapter.encode(torch.zeros(1, 20))
    with pytest.raises(ic.AdapterError, match=r"image_embeds, not its hidden states"):
        new_adapter(unets["sd15"], "base").encode(torch.zeros(1, 9, 20))
    with pytest.raises(ic.AdapterError, match=r"takes 1 features.*2 were given"):
        adapter.encode(torch.zeros(1, 20), torch.zeros(1, 20))


def test_several_faces_become_more_tokens(unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"], "portrait")
    faces = torch.randn(2, 3, 12)
    tokens = adapter.encode(faces)
    assert tokens.shape == (2, 48, 24)
    torch.testing.assert_close(tokens[:, 16:32], adapter.encode(faces[:, 1]))


def test_init_from_unet(unet: Any) -> None:
    sites = ic.diffusers_sites(unet)
    adapter = ic.IPAdapter(ic.new_spec("base", [s.dim for s in sites], 24, image_dim=20))
    ic.init_from_unet(adapter.layers, unet)
    for site, (to_k, to_v) in zip(sites, adapter.layers.pairs(), strict=True):
        attention = unet.get_submodule(site.name)
        assert torch.equal(to_k.weight, attention.to_k.weight) and torch.equal(to_v.weight, attention.to_v.weight)
        assert to_k.weight.requires_grad and to_k.weight.data_ptr() != attention.to_k.weight.data_ptr()


def test_init_from_another_unet(unets: Any, new_adapter: Any) -> None:
    with pytest.raises(ic.AdapterError, match=r"16 layers, the UNet 70"):
        ic.init_from_unet(new_adapter(unets["sd15"]).layers, unets["sdxl"])


def test_new_lora_is_an_update_of_zero() -> None:
    adapter = ic.IPAdapter(ic.new_spec("faceid", [8, 16], 24, lora_rank=2))
    assert adapter.lora is not None
    x = torch.randn(3, 24)
    assert torch.equal(adapter.lora.part(1, "to_k")(x), torch.zeros(3, 8))
    assert adapter.lora.part(1, "to_k").down.weight.abs().max() > 0


def test_operations_of_the_host(tmp_path: Path, unets: Any, new_adapter: Any, features: Any) -> None:
    """A host's layer classes are used everywhere, and the latents follow the input's dtype."""

    class Cast(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))

    class CastNorm(torch.nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x))

    class ManualCast:
        Linear = Cast
        LayerNorm = CastNorm

    for kind in ("plus", "faceid-plus"):
        adapter = new_adapter(unets["sd15"], kind, **({"shortcut": True} if kind == "faceid-plus" else {}))
        ic.save_adapter(tmp_path / "a.safetensors", adapter.half())
        loaded = ic.load_adapter(tmp_path / "a.safetensors", operations=ManualCast)
        leaves = {type(m) for m in loaded.modules() if not list(m.children())}
        assert leaves <= {Cast, CastNorm, torch.nn.GELU}
        pair = loaded(*features(adapter))[0]
        assert pair.key.dtype == torch.float32 and torch.isfinite(pair.key).all()


def test_export_has_published_keys_only(tmp_path: Path, unets: Any, new_adapter: Any) -> None:
    adapter = new_adapter(unets["sd15"], "faceid")
    state = ic.export_state(adapter)
    assert {key.split(".")[0] for key in state} == {"image_proj", "ip_adapter"}
    assert "ip_adapter.31.to_k_ip.weight" in state and "ip_adapter.31.to_out_lora.up.weight" in state
    save_file(state, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()
