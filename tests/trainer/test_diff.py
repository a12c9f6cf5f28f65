"""What differs between two adapters, and the exit status that says whether anything does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ipadapter_core import IPAdapter
from ipadapter_trainer.cli import app
from ipadapter_trainer.files.convert import convert
from ipadapter_trainer.files.diff import diff
from ipadapter_trainer.files.writing import write_adapter

Make = Callable[..., IPAdapter]


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, adapter: IPAdapter, metadata: dict[str, str] | None = None, **options: Any) -> Path:
        write_adapter(tmp_path / name, adapter, metadata, verify=False, **options)
        return tmp_path / name

    return make


def test_equal_files(random_adapter: Make, write: Any, tmp_path: Path) -> None:
    a = write("a.safetensors", random_adapter("faceid"), {"ipadapter.steps": "1"})
    b = write("b.safetensors", random_adapter("faceid"), {"ipadapter.steps": "2"})
    code, out, _ = ipadapter("diff", a, b)
    assert code == 0
    assert "ipadapter.steps: 1 / 2" in out
    assert "image projector: 0 of 6 tensors differ; equal" in out
    assert out.splitlines()[-1] == "equal"
    converted = convert(a, tmp_path / "c.bin").file  # another container, the same numbers
    assert ipadapter("diff", a, converted)[0] == 0


def test_a_change_is_found_and_measured(random_adapter: Make, write: Any) -> None:
    one, other = random_adapter(), random_adapter()
    weight = other.layers.get_submodule("9").to_v_ip.weight
    largest = weight.abs().max().item()
    weight[2, 3] += 2 * largest  # now the largest value itself
    other.projector.norm.bias[1] += 0.125
    a, b = write("a.safetensors", one), write("b.safetensors", other)
    code, out, _ = ipadapter("diff", a, b, "--json")
    assert code == 1
    found = json.loads(out)
    changed = {key: t for key, t in found["tensors"].items() if t["max_abs"] > 0}
    assert set(changed) == {"ip_adapter.9.to_v_ip.weight", "image_proj.norm.bias"}
    assert changed["ip_adapter.9.to_v_ip.weight"]["max_abs"] == pytest.approx(2 * largest, rel=1e-6)
    expected = 2 * largest / weight.abs().max().item()
    assert changed["ip_adapter.9.to_v_ip.weight"]["relative"] == pytest.approx(expected, rel=1e-6)
    assert [(p["part"], p["tensors"], p["changed"]) for p in found["parts"]] == [
        ("image projector", 4, 1),
        ("keys", 16, 0),
        ("values", 16, 1),
    ]
    code, out, _ = ipadapter("diff", a, b)
    assert code == 1
    assert "values: 1 of 16 tensors differ; largest difference" in out
    assert "  ip_adapter.9.to_v_ip.weight: " in out
    assert out.splitlines()[-1] == "different"
    again, _, _ = ipadapter("diff", b, a)
    assert again == 1


def test_tolerance_is_a_share_of_the_largest_value(random_adapter: Make, write: Any) -> None:
    """float16 rounds each number by at most 2^-11 of itself."""
    a = write("a.safetensors", random_adapter("plus"))
    b = write("b.safetensors", random_adapter("plus"), dtype=torch.float16)
    worst = max(t.relative for t in diff(a, b).tensors.values())
    assert 2**-14 < worst <= 2**-11
    assert ipadapter("diff", a, b)[0] == 1
    assert ipadapter("diff", a, b, "--tolerance", "1e-5")[0] == 1
    code, out, _ = ipadapter("diff", a, b, "--tolerance", "0.0005")
    assert code == 0
    assert "dtype: float32 / float16" in out
    assert out.splitlines()[-1] == "equal within 0.0005"


def test_the_same_numbers_in_another_dtype_are_equal_with_any_tolerance(random_adapter: Make, write: Any) -> None:
    half = write("half.safetensors", random_adapter(), dtype=torch.float16)
    single = convert(half, half.with_name("single.safetensors"), dtype=torch.float32).file
    assert all(t.max_abs == 0 for t in diff(half, single).tensors.values())
    assert ipadapter("diff", half, single)[0] == 1  # not the same bytes
    assert ipadapter("diff", half, single, "--tolerance", "1e-12")[0] == 0


def test_other_kinds_and_families(random_adapter: Make, write: Any) -> None:
    base, plus = write("base.safetensors", random_adapter("base")), write("plus.safetensors", random_adapter("plus"))
    code, out, _ = ipadapter("diff", base, plus)
    assert code == 1
    assert "kind: base / plus" in out
    assert re.search(r"only in the first: image_proj\.\S+, image_proj\.\S+, image_proj\.\S+ and 1 more", out)
    assert "only in the second: image_proj." in out
    assert "and 48 more" in out
    other = write("sd2.safetensors", random_adapter("base", "sd2"))
    code, out, _ = ipadapter("diff", base, other, "--tolerance", "100")
    assert code == 1
    assert "cross_attention_dim: 64 / 128" in out
    assert "other shapes: 36 tensors, such as image_proj.norm.bias: [64] / [128]" in out


def test_versions_differ_though_the_weights_do_not(random_adapter: Make, write: Any, tmp_path: Path) -> None:
    v1 = write("v1.safetensors", random_adapter("faceid-plus"))
    v2 = write("v2.safetensors", random_adapter("faceid-plusv2"))
    code, out, _ = ipadapter("diff", v1, v2)
    assert code == 1
    assert "shortcut: False / True" in out
    silent = write("silent.bin", random_adapter("faceid-plus"))  # does not contradict either
    code, out, _ = ipadapter("diff", v1, silent)
    assert code == 0
    assert "shortcut: False / None" in out


def test_layouts_and_folders(random_adapter: Make, write: Any, tmp_path: Path) -> None:
    a = write("a.safetensors", random_adapter())
    (tmp_path / "run").mkdir()
    write("run/adapter.safetensors", random_adapter())
    assert ipadapter("diff", a, tmp_path / "run")[0] == 0


def test_diff_names_what_is_wrong(random_adapter: Make, write: Any, tmp_path: Path) -> None:
    a = write("a.safetensors", random_adapter())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("hello, this is not a model")
    for arguments, words in [
        ([a, "/nowhere.bin"], "/nowhere.bin: no such file"),
        (["/nowhere.bin", a], "/nowhere.bin: no such file"),
        ([a, tmp_path / "text.bin"], "text.bin: a text file that begins with 'hello, this is not a model'"),
        ([a, tmp_path / "empty"], "no adapter in this folder"),
    ]:
        code, _, err = ipadapter("diff", *arguments)
        assert (code, "Traceback" in err, len(err.strip().splitlines())) == (2, False, 1), err
        assert words in err
    assert ipadapter("diff", a)[0] == 2
    assert ipadapter("diff", a, a, "--tolerance", "-1")[0] == 2
