"""Exports: what is written, what is checked before it appears, and what a host finds."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ipadapter_core import (
    FAMILIES,
    AdapterError,
    AdapterSpec,
    IPAdapter,
    adapter_from_checkpoint,
    checkpoint_from_state,
    export_state,
    load_adapter,
    new_spec,
    spec_metadata,
)
from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import DiskError, ExportError, VerificationError
from ipadapter_trainer.files import diffusers_loader, verify, writing
from ipadapter_trainer.files.provenance import export_adapter
from ipadapter_trainer.files.published import name_problem, published_differences, published_name, published_shapes
from ipadapter_trainer.files.verify import verify_export
from ipadapter_trainer.files.writing import DTYPES, write_adapter
from ipadapter_trainer.settings.kinds import TRAIN_KINDS

Make = Callable[..., IPAdapter]
WEIGHT_KEYS = json.loads((Path(__file__).parents[1] / "core" / "golden" / "weight_keys.json").read_text())
GOLDEN_KINDS = {  # the golden file's name -> the config's kind, what is not the default
    "base_vith": ("base", {}),
    "base_bigG": ("base", {"image_dim": 1280}),
    "plus": ("plus", {}),
    "full": ("full", {}),
    "faceid": ("faceid", {}),
    "faceid_portrait": ("portrait", {}),
    "faceid_plus(v2)": ("faceid-plusv2", {}),
}
GOLDEN_FAMILIES = {"sd15": "sd15", "sd21": "sd2", "sdxl": "sdxl"}


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def real_spec(kind: str, family: str, **options: Any) -> AdapterSpec:
    context, widths = FAMILIES[family]
    chosen = TRAIN_KINDS[kind]
    return new_spec(chosen.kind, widths, context, shortcut=chosen.shortcut, **options)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


# ---- the published format


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
@pytest.mark.parametrize("golden", GOLDEN_KINDS)
def test_the_table_is_the_published_format(family: str, golden: str) -> None:
    """Every key and shape, at real size, of 21 variants made with the original's modules."""
    kind, options = GOLDEN_KINDS[golden]
    spec = real_spec(kind, GOLDEN_FAMILIES[family], **options)
    wanted = {
        f"{part}.{key}": tuple(shape)
        for part in ("image_proj", "ip_adapter")
        for key, shape in WEIGHT_KEYS[family][golden][part].items()
    }
    assert published_shapes(spec) == wanted
    assert published_differences(spec) == ()


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_the_layers_of_diffusers_unet_are_the_published_ones(family: str) -> None:
    """The UNet that files are checked with is the real one: its processors' names are the golden ones, in order."""
    spec = real_spec("base", GOLDEN_FAMILIES[family])
    with torch.device("meta"):
        unet = diffusers_loader._UNet(**diffusers_loader.unet_config(spec))
    assert list(unet.attn_processors) == WEIGHT_KEYS[family]["attn_processor_names"]


def test_what_is_unlike_the_published_is_named(random_adapter: Make) -> None:
    (problem,) = published_differences(real_spec("base", "sdxl", num_tokens=8))
    assert problem == "8 tokens where the published files have 4"
    wide = published_differences(real_spec("plus", "sdxl", resampler_dim=2048))  # hosts take this for Kolors
    assert "2048 channels in the resampler where the published files have 1280" in wide
    assert "a UNet of its own" in published_differences(random_adapter().spec)[0]


# ---- every kind, through both loaders


@pytest.mark.parametrize("layout", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_every_kind_is_the_same_in_both_loaders(kind: str, layout: str, random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter(kind, layout)
    suffixes = (".bin", ".safetensors") if layout == "sd15" else (".safetensors",)
    for suffix in suffixes:
        checked = write_adapter(tmp_path / f"a{suffix}", adapter, {"note": "x"}, dtype=torch.float16)
        assert checked is not None
        assert checked.loaders == ("ipadapter_core", verify.DIFFUSERS)
        assert checked.dtypes == ("float16",)
        assert checked.tensors == len(export_state(adapter))
        assert 0 < checked.rounding < 0.01
        assert checked.disagreement < 2e-5
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"a{suffix}" for suffix in suffixes]
    assert metadata_of(tmp_path / "a.safetensors")["note"] == "x"


@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_diffusers_modules_give_our_tokens_and_keys(kind: str, random_adapter: Make, tmp_path: Path) -> None:
    """What the check rests on, without it: diffusers' modules against `IPAdapter` itself."""
    adapter = random_adapter(kind)
    file = tmp_path / "a.safetensors"
    write_adapter(file, adapter, verify=False)
    theirs = diffusers_loader.load_with_diffusers(file, adapter.spec)
    features = verify.random_features(adapter.spec)
    tokens = adapter.encode(*features)
    torch.testing.assert_close(theirs.encode(*features), tokens, atol=1e-5, rtol=1e-5)
    pairs = zip(adapter.spec.layer_ids, theirs.keys_values(tokens), adapter.keys_values(tokens), strict=True)
    for id, pair, own in pairs:
        torch.testing.assert_close(pair.key, own.key, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pair.value, own.value, atol=1e-5, rtol=1e-5)
        assert own.key.shape[-1] == adapter.spec.layer_dims[id // 2]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("base", {"num_tokens": 8}, "takes 4 tokens, this adapter has 8"),
        ("plus", {"depth": 2}, "takes 4 resampler layers, this adapter has 2"),
        ("plus", {"dim_head": 16}, "takes 64 channels per head, this adapter has 16"),
        ("faceid-plus", {"num_tokens": 6}, "takes 4 tokens, this adapter has 6"),
    ],
)
def test_what_diffusers_hard_codes_is_a_note(
    kind: str, changes: dict[str, int], words: str, random_adapter: Make, tmp_path: Path
) -> None:
    adapter = random_adapter(kind, **changes)
    checked = write_adapter(tmp_path / "a.safetensors", adapter)
    assert checked is not None
    assert checked.loaders == ("ipadapter_core",)
    assert any(words in note for note in checked.notes)
    with pytest.raises(Exception, match=r"."):  # and it is true: diffusers refuses it, or makes something else of it
        theirs = diffusers_loader.load_with_diffusers(tmp_path / "a.safetensors", adapter.spec)
        features = verify.random_features(adapter.spec)
        torch.testing.assert_close(theirs.encode(*features), adapter.encode(*features))


def test_more_tokens_where_diffusers_takes_them(random_adapter: Make, tmp_path: Path) -> None:
    for number, (kind, tokens) in enumerate([("plus", 8), ("faceid", 6), ("portrait", 4), ("full", 50)]):
        checked = write_adapter(tmp_path / f"{number}.safetensors", random_adapter(kind, num_tokens=tokens))
        assert checked is not None
        assert len(checked.loaders) == 2


def test_a_unet_that_nobody_knows_is_a_note(random_adapter: Make, tmp_path: Path) -> None:
    spec = replace(random_adapter().spec, layer_dims=(4, 8, 4), family="context-64")
    adapter = adapter_from_checkpoint(
        checkpoint_from_state({k: torch.ones(s) for k, s in published_shapes(spec).items()})
    )
    checked = write_adapter(tmp_path / "a.safetensors", adapter)
    assert checked is not None
    assert any("no known UNet has 3 layers" in note for note in checked.notes)


# ---- what the check finds


def damaged(adapter: IPAdapter, change: Callable[[dict[str, torch.Tensor]], None], file: Path) -> Path:
    state = {key: tensor.clone() for key, tensor in export_state(adapter).items()}
    change(state)
    save_file(state, file, metadata=spec_metadata(adapter.spec))
    return file


def swap_layers(state: dict[str, torch.Tensor]) -> None:
    one, other = "ip_adapter.1.to_k_ip.weight", "ip_adapter.3.to_k_ip.weight"
    state[one], state[other] = state[other], state[one]


def add(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[key].view(-1)[0] += value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_layers, r"ip_adapter\.1\.to_k_ip\.weight differs by up to \d"),
        (add("image_proj.proj.bias", 0.25), r"image_proj\.proj\.bias differs by up to 0\.25"),
        (lambda state: state.pop("ip_adapter.31.to_v_ip.weight"), "does not load|is missing"),
        (
            lambda state: state.update({"image_proj.more": torch.ones(2)}),
            r"image_proj\.more is \[2\]; the published format of a base adapter has no such tensor",
        ),
        (
            lambda state: state.update({"image_proj.norm.bias": torch.ones(3)}),
            r"image_proj\.norm\.bias is \[3\].* has \[64\]",
        ),
        (lambda state: state["ip_adapter.5.to_v_ip.weight"].fill_(torch.nan), "5.to_v_ip.weight holds NaN"),
    ],
)
def test_a_wrong_file_is_refused(change: Any, words: str, random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter()
    file = damaged(adapter, change, tmp_path / "a.safetensors")
    with pytest.raises(VerificationError, match=words):
        verify_export(file, adapter)
    assert file.exists()


def test_another_kind_or_version_is_refused(random_adapter: Make, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(file, random_adapter("faceid-plus"), verify=False)
    with pytest.raises(VerificationError, match=r"its shortcut reads as False, it was True"):
        verify_export(file, random_adapter("faceid-plusv2"))
    with pytest.raises(VerificationError, match=r"perceiver_resampler.*no such tensor"):
        verify_export(file, random_adapter("faceid"))


def test_the_trainers_key_layout_is_refused(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter()
    names = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    state = export_state(adapter)
    for old, new in names.items():
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(VerificationError, match="in the trainer layout"):
        verify_export(tmp_path / "a.safetensors", adapter)


@pytest.mark.parametrize("kind", ["base", "faceid"])
def test_a_disagreement_of_diffusers_is_an_error(
    kind: str, random_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that reads another layer for the last one, or another LoRA, as a wrong layer order would."""
    loader = diffusers_loader._UNet
    convert, loras = loader._convert_ip_adapter_attn_to_diffusers, loader._load_ip_adapter_loras

    def shifted(self: Any, state_dicts: Any, **options: Any) -> Any:
        layers = dict(state_dicts[0]["ip_adapter"])
        layers["7.to_v_ip.weight"] = layers["5.to_v_ip.weight"]
        return convert(self, [{**state_dicts[0], "ip_adapter": layers}], **options)

    def no_loras(self: Any, state_dicts: Any) -> Any:
        loras(self, state_dicts)
        self.adapter_lora = {}
        return {}

    file = tmp_path / "a.safetensors"
    if kind == "base":
        monkeypatch.setattr(loader, "_convert_ip_adapter_attn_to_diffusers", shifted)
        words = r"the values of layer 7 differ by \d+\.\d+% of .* between ipadapter_core and diffusers"
    else:
        monkeypatch.setattr(loader, "_load_ip_adapter_loras", no_loras)
        words = r"another LoRA tensor than ip_adapter\.0\.to_q_lora\.down\.weight"
    with pytest.raises(VerificationError, match=words):
        write_adapter(file, random_adapter(kind))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_what_was_there(
    random_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(file, random_adapter())
    before = file.read_bytes()
    write = writing._write

    def other_weights(path: Path, adapter: IPAdapter, metadata: dict[str, str]) -> None:
        write(path, random_adapter(seed=5), metadata)

    monkeypatch.setattr(writing, "_write", other_weights)
    with pytest.raises(VerificationError, match="differs by up to"):
        write_adapter(file, random_adapter())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert file.read_bytes() == before


# ---- dtypes, disks, bad weights


def test_dtypes_and_their_rounding(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter("plus")
    found = {}
    for name, dtype in DTYPES.items():
        checked = write_adapter(tmp_path / f"{name}.safetensors", adapter, dtype=dtype)
        assert checked is not None
        found[name] = checked.rounding
        assert {t.dtype for t in load_file(tmp_path / f"{name}.safetensors").values()} == {dtype}
    assert found["float32"] == 0
    assert 0 < found["float16"] < found["bfloat16"] < 0.1
    assert next(adapter.parameters()).dtype == torch.float32  # the adapter stays as it is


def test_values_that_a_dtype_cannot_hold(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter()
    adapter.projector.proj.weight[0, 0] = 7e4
    with pytest.raises(ExportError, match=r"image_proj\.proj\.weight has values up to 7e\+04, float16 holds at most"):
        write_adapter(tmp_path / "a.safetensors", adapter, dtype=torch.float16)
    write_adapter(tmp_path / "b.safetensors", adapter, dtype=torch.bfloat16)
    tiny = random_adapter()
    tiny.layers.get_submodule("9").to_k_ip.weight.mul_(1e-7)  # float16 keeps less than three digits of it
    with pytest.raises(VerificationError, match=r"the keys of layer 9 differ .* float16 is too coarse .* float32"):
        write_adapter(tmp_path / "a.safetensors", tiny, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_that_are_not_finite(suffix: str, random_adapter: Make, tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf):
        for dtype in (None, torch.float16):
            adapter = random_adapter()
            adapter.projector.norm.bias[1] = value
            with pytest.raises(AdapterError, match=r"norm\.bias holds NaN or infinity") as raised:
                write_adapter(tmp_path / f"a{suffix}", adapter, dtype=dtype, verify=False)
            assert ".tmp" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_full_disk_leaves_what_was_there(suffix: str, random_adapter: Make, tmp_path: Path) -> None:
    """The kernel refuses every byte beyond a limit, as a full disk does."""
    file = tmp_path / f"a{suffix}"
    file.write_text("what was there")
    adapter = random_adapter("plus")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"File too large \(needs .* free\)\. Free some space and run"):
            write_adapter(file, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "what was there"


def test_a_suffix_that_no_host_reads(random_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the suffix '\.pt' is unknown. Use \.safetensors or \.bin"):
        write_adapter(tmp_path / "a.pt", random_adapter())


def test_a_bin_says_what_it_cannot_say(random_adapter: Make, tmp_path: Path) -> None:
    checked = write_adapter(tmp_path / "a.bin", random_adapter("faceid-plusv2"), {"origin": "here"})
    assert checked is not None
    text = checked.as_text()
    assert "does not say that shortcut is True" in text
    assert "1 entries of metadata are left out" in text
    with pytest.raises(VerificationError, match=r"b\.bin: its heads reads as 1, it was 4\. A \.bin has no header"):
        write_adapter(tmp_path / "b.bin", random_adapter("plus", dim_head=16))
    assert not (tmp_path / "b.bin").exists()


def test_an_old_claim_does_not_win_over_what_is_written(random_adapter: Make, tmp_path: Path) -> None:
    adapter = random_adapter("faceid-plusv2")
    write_adapter(tmp_path / "a.safetensors", adapter, {"ipadapter.shortcut": "false", "ipadapter.encoder": "mine"})
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert (loaded.spec.shortcut, loaded.spec.encoder_id) == (True, "mine")


def test_export_adapter_of_a_training(random_adapter: Make, tmp_path: Path) -> None:
    """The function that the trainer calls: unwrapped, in its own dtype unless asked, checked when asked."""
    adapter = random_adapter("faceid").requires_grad_(True)
    file = export_adapter(
        tmp_path / "a.safetensors", adapter, {"ipadapter.steps": "7"}, dtype=torch.float16, verify=True
    )
    assert metadata_of(file)["ipadapter.steps"] == "7"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    plain = export_adapter(tmp_path / "b.safetensors", torch.nn.parallel.DataParallel(adapter), {})
    assert all(torch.equal(t, export_state(adapter)[key]) for key, t in load_file(plain).items())


# ---- names


def test_published_names() -> None:
    def name(kind: str, family: str = "sd15", **options: Any) -> str:
        return published_name(real_spec(kind, family, **options), "")

    assert [name(kind) for kind in TRAIN_KINDS] == [
        "ip-adapter_sd15",
        "ip-adapter-plus_sd15",
        "ip-adapter-full-face_sd15",
        "ip-adapter-faceid_sd15",
        "ip-adapter-faceid-plus_sd15",
        "ip-adapter-faceid-plusv2_sd15",
        "ip-adapter-faceid-portrait_sd15",
    ]
    assert name("base", image_dim=1280) == "ip-adapter_sd15_vit-G"
    assert name("base", image_dim=768) == "ip-adapter_sd15_vit-L"
    assert name("base", "sd2") == "ip-adapter_sd21"
    assert name("base", "sdxl") == "ip-adapter_sdxl_vit-h"
    assert name("base", "sdxl", image_dim=1280) == "ip-adapter_sdxl"
    assert name("plus", "sdxl") == "ip-adapter-plus_sdxl_vit-h"
    assert name("plus", "sdxl", image_dim=1664) == "ip-adapter-plus_sdxl_vit-G"
    assert name("faceid-plusv2", "sdxl") == "ip-adapter-faceid-plusv2_sdxl"
    assert name("portrait", "sdxl") == "ip-adapter-faceid-portrait_sdxl"
    unnormalised = replace(real_spec("portrait", "sdxl"), unnormalised=True)
    assert published_name(unnormalised) == "ip-adapter-faceid-portrait_sdxl_unnorm.safetensors"
    with pytest.raises(ExportError, match=r"unknown whether this .* v1 or v2"):
        published_name(replace(real_spec("faceid-plus", "sd15"), shortcut=None))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_a_made_name_has_no_problem(kind: str, family: str) -> None:
    spec = real_spec(kind, family)
    assert name_problem(published_name(spec), spec) is None


def test_name_problems() -> None:
    v1, v2 = real_spec("faceid-plus", "sd15"), real_spec("faceid-plusv2", "sdxl")
    portrait = real_spec("portrait", "sdxl")
    unnormalised = replace(portrait, unnormalised=True)
    cases = [
        ("cats.safetensors", v2, "no 'plusv2'.*faceid-plus v1.*ip-adapter-faceid-plusv2_sdxl.safetensors"),
        ("cats-plus-v2.bin", v2, "no 'plusv2'.*ip-adapter-faceid-plusv2_sdxl.bin"),
        ("my-PlusV2.bin", v1, "has 'plusv2'.*ip-adapter-faceid-plus_sd15.bin"),
        ("plusv2.bin", real_spec("plus", "sd15"), "has 'plusv2'.*a plus adapter"),
        ("cats.bin", portrait, "no 'portrait'.*ip-adapter-faceid-portrait_sdxl.bin"),
        ("portrait-unnorm.bin", portrait, "has 'unnorm'"),
        ("portrait.bin", unnormalised, "no 'unnorm'"),
    ]
    for name, spec, words in cases:
        problem = name_problem(name, spec)
        assert problem is not None
        assert re.search(words, problem), problem
    for name, spec in (("a-plusv2.bin", v2), ("cats.bin", v1), ("cats.bin", real_spec("full", "sd15"))):
        assert name_problem(name, spec) is None


# ---- the command


@pytest.fixture
def run(model_folder: Path, config: Any) -> Path:
    """Of the whole model: diffusers reads no adapter of few layers."""
    from ipadapter_trainer.training.train import train

    train(config.model_copy(update={"steps": 2, "save_every": 1}))
    return config.output


def test_export_of_a_training(run: Path, tmp_path: Path) -> None:
    code, out, err = ipadapter("export", run, tmp_path / "adapters")
    assert code == 0, err
    file = tmp_path / "adapters" / "ip-adapter_context-32.safetensors"
    assert f"Saved {file}" in out
    assert "ipadapter_core and diffusers" in out
    newest = load_adapter(run / "checkpoint-000002" / "adapter.safetensors")
    exported = load_adapter(file)
    assert {t.dtype for t in export_state(exported).values()} == {torch.float16}
    for key, tensor in export_state(newest).items():
        assert torch.equal(export_state(exported)[key], tensor.half())
    assert exported.metadata["ipadapter.steps"] == "2"
    assert exported.metadata["ipadapter.base_model"] == newest.metadata["ipadapter.base_model"]

    code, _, err = ipadapter("export", run / "checkpoint-000001", tmp_path / "one.safetensors", "--dtype", "float32")
    assert code == 0, err
    assert load_adapter(tmp_path / "one.safetensors").metadata["ipadapter.steps"] == "1"
    code, out, _ = ipadapter("inspect", run)
    assert code == 0
    assert "checkpoint-000002" in out


def test_export_warns_of_a_name(random_adapter: Make, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.safetensors", random_adapter("faceid-plusv2"), verify=False)
    code, out, err = ipadapter("export", tmp_path, tmp_path / "cats.safetensors")
    assert code == 0
    assert "Warning: The name cats.safetensors has no 'plusv2' in it" in err
    assert "ip-adapter-faceid-plusv2_context-64.safetensors" in err
    assert "set shortcut = True" in out


def test_export_names_what_is_wrong(random_adapter: Make, tmp_path: Path) -> None:
    source = tmp_path / "run"
    source.mkdir()
    write_adapter(source / "adapter.safetensors", random_adapter(), verify=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.safetensors").write_text("x")
    cases: list[tuple[list[str | Path], str]] = [
        (["/nowhere", tmp_path / "o"], "/nowhere: no such file"),
        ([tmp_path / "empty", tmp_path / "o"], "no adapter in this folder (found: nothing)"),
        ([source, tmp_path / "o.ckpt"], "the suffix '.ckpt' is unknown"),
        ([source, tmp_path / "o", "--dtype", "fp16"], "dtype 'fp16' is unknown. Use one of: float16"),
        ([source, tmp_path / "there.safetensors"], "exists already. Choose another name, or add --force"),
        ([source, source / "adapter.safetensors", "--force"], "is the file that is read"),
        ([source, tmp_path / "there.safetensors" / "o.bin"], "there.safetensors"),
    ]
    for arguments, words in cases:
        code, _, err = ipadapter("export", *arguments)
        assert (code, "Traceback" in err, len(err.strip().splitlines())) == (2, False, 1), err
        assert words in err
    assert (tmp_path / "there.safetensors").read_text() == "x"
    code, _, err = ipadapter("export", source, tmp_path / "there.safetensors", "--force")
    assert code == 0, err
    load_adapter(tmp_path / "there.safetensors")
