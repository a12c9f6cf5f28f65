"""`ipadapter cache`: writing, resuming, sharing the work, refusing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ipadapter_trainer.cache import plan as cache_plan
from ipadapter_trainer.cache.files import MANIFEST, Manifest, read_manifest, write_whole
from ipadapter_trainer.cache.plan import cache_settings
from ipadapter_trainer.cache.quantise import pack_features, unpack_features
from ipadapter_trainer.cache.read import CachedDataset
from ipadapter_trainer.cache.write import write_cache
from ipadapter_trainer.cli import app
from ipadapter_trainer.data.from_config import examples_from_config
from ipadapter_trainer.errors import CacheError, ConfigError, DiskError
from ipadapter_trainer.models.from_config import base_model_from_config
from ipadapter_trainer.runtime.disk import show_bytes
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.settings.config_file import make_config

from .tiny_data import assert_same, write_shard
from .warm_python import WarmPython, process_environment


@pytest.fixture
def settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Twelve images more, of three shapes, and a cache."""
    for number in range(12):
        shape = (70, 90 + 30 * (number // 5), 3)
        pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(Path(settings["data"]) / f"noise{number:02}.png")
        (Path(settings["data"]) / f"noise{number:02}.txt").write_text(f"noise, {number % 4} of it")
    return {**settings, "cache": str(tmp_path / "cache")}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_plan, "SHARD_BYTES", 4000)


def keys(settings: dict[str, Any], **changes: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def ipadapter(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def manifest_of(config: TrainConfig) -> Manifest:
    assert config.cache is not None
    return read_manifest(
        config.cache, cache_settings(config, examples_from_config(config), base_model_from_config(config))
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- As a user types it


def test_cache_and_train(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items() if key != "cache"))
    folder = Path(settings["cache"])
    code, out, err = ipadapter("cache", file, f"cache={folder}")
    assert code == 0, err
    assert "18 images" in out
    assert "11 distinct captions      11.3 KB" in out  # 11 x (16 x 32 x 2 + 4) bytes
    assert "free" in out
    assert f"Train with cache={folder}" in out
    assert sorted(p.name for p in folder.iterdir()) == ["captions", "images", MANIFEST]
    code, out, err = ipadapter("train", file, f"cache={folder}", "steps=2", "validation_images=0")
    assert code == 0, err
    assert "features from the cache" in out
    code, out, _ = ipadapter("cache", file, f"cache={folder}")
    assert code == 0
    assert f"{folder} is complete" in out


def test_shards_are_cached_as_the_folder_that_they_were_made_of(settings: dict[str, Any], tmp_path: Path) -> None:
    """Same images in the same order: the same tensors, and a training that knows its images, with epochs, buckets
    and a validation.
    """
    files = sorted(p for p in Path(settings["data"]).iterdir() if p.suffix in (".png", ".txt"))
    samples = {p.stem: {"txt": p.with_suffix(".txt").read_bytes()} for p in files}
    for file in files:
        samples[file.stem][file.suffix[1:]] = file.read_bytes()
    names = sorted(samples)
    for number in range(2):
        write_shard(tmp_path / f"s{number}.tar", {name: samples[name] for name in names[9 * number :][:9]})
    changes = {"data": f"{tmp_path}/s{{0..1}}.tar", "buckets": True, "bucket_step": 16, "batch_size": 2}
    code, _, err = ipadapter("cache", *keys({**settings, **changes}))
    assert code == 0, err
    code, _, err = ipadapter("cache", *keys({**settings, **changes}, data=settings["data"], cache=tmp_path / "other"))
    assert code == 0, err
    caches = [Path(settings["cache"]), tmp_path / "other"]
    found = [sorted((folder / "images").iterdir()) for folder in caches]
    assert len(found[0]) == len(found[1]) > 1  # more than one bucket
    for one, other in zip(*found, strict=True):
        assert_same(load_file(one), load_file(other))
    code, out, err = ipadapter("train", *keys({**settings, **changes}, epochs=1, validation_images=1, steps=""))
    assert code == 0, err
    assert "features from the cache" in out


def test_the_manifest_says_what_made_it(settings: dict[str, Any]) -> None:
    folder = write_cache(make_config({**settings, "flip": True, "kind": "plus", "cache_image_features": "int8"}))
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["base_model"] == "tiny-sd15"
    assert manifest["mixed_precision"] == "no"
    assert manifest["library"].startswith("ip-adapter-kit")
    assert manifest["buckets"] == [[64, 64]]
    expected = {"resolution": 64, "flip": True, "cache_image_features": "int8", "crop": "center", "seed": None}
    assert expected.items() <= manifest["settings"].items()
    captions, images = "captions/shard-00000.safetensors", "images/shard-00000.safetensors"
    assert manifest["shards"] == [captions, images]
    assert load_file(folder / images)["row"].tolist() == list(range(18))
    assert load_file(folder / captions)["row"].tolist() == list(range(18, 18 + 11))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache="], ["Where shall the cache go?", "cache=..."]),
        (["cach=x"], ["unknown key 'cach'", "did you mean 'cache'"]),
        (["cache_variants=3"], ["cache_variants=3", "the same crop 3 times", "crop=random"]),
        (["cache_image_features=int4"], ["cache_image_features", "int4", "float16"]),
        (["data=nowhere"], ["nowhere"]),
        (["data=https://host/some.tar"], ["local shards", "download"]),
        (["data=nowhere.tar"], ["nowhere.tar", "no such file"]),
        (["resolution=60"], ["resolution", "multiple of 8"]),
        (["second.toml"], ["second.toml: no such config"]),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_one_line(settings: dict[str, Any], arguments: list[str], words: list[str]) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    kept = {key: value for key, value in settings.items() if key not in given}
    code, _, err = ipadapter("cache", *keys(kept), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not Path(settings["cache"]).exists()


def test_wrong_folders_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    code, _, err = ipadapter("cache")
    assert code == 2
    assert "Write `ipadapter cache CONFIG key=value ...`" in err
    code, _, err = ipadapter("cache", *keys(settings, cache=settings["data"]))
    assert code == 2
    assert "has other files in it, and no manifest.json" in err
    file = tmp_path / "file"
    file.touch()
    code, _, err = ipadapter("cache", *keys(settings, cache=file))
    assert code == 2
    assert "is a file" in err


def test_a_cache_of_other_settings_is_not_written_over(settings: dict[str, Any]) -> None:
    folder = write_cache(make_config(settings))
    before = contents(folder)
    code, _, err = ipadapter("cache", *keys(settings, resolution=32, flip="true"))
    assert code == 2
    assert "resolution was 64 and is now 32" in err
    assert "flip was False and is now True" in err
    assert "delete this one" in err
    assert contents(folder) == before


# --- The disk


def test_a_disk_without_room_is_refused_before_the_start(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1500, 1500))
    code, out, err = ipadapter("cache", *keys(settings))
    assert code == 2
    assert "has 1.5 KB free" in err
    assert (
        "The cache needs 31.3 KB" in err
    )  # 18 x (2 x 4 x 8 x 8 x 2 + 24 + 4 + 8 + 24 x 2) + 11 x (16 x 32 x 2 + 4) = 31,252
    assert "31.3 KB" in out
    assert not Path(settings["cache"]).exists()
    code, out, _ = ipadapter("cache", *keys(settings), "--force")
    assert code == 0
    assert "31.3 KB to be written, 1.5 KB free" in out


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it."""
    target = tmp_path / "shard"
    write_whole(target, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"shard: File too large \(needs 30.0 KB, .*run the same command again;"):
            write_whole(target, b"new" * 10**4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# --- Resume


def test_only_missing_shards_are_made_again(settings: dict[str, Any], small_shards: None) -> None:
    config, lines = make_config(settings), []
    folder = write_cache(config)
    before = contents(folder)
    files = sorted((folder / "images").iterdir())
    assert len(files) > 3
    times = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    write_cache(config, say=lines.append)
    total = len(before) - 1
    assert f"Resuming: {total - 2} of {total} shards are written already." in "\n".join(lines)
    assert contents(folder) == before
    assert [file for file in files if file.stat().st_mtime_ns == times[file]] == files[2:]


def test_another_batch_size_keeps_the_buckets(settings: dict[str, Any], small_shards: None) -> None:
    settings |= {"buckets": True, "bucket_step": 8}
    folder = write_cache(make_config({**settings, "batch_size": 8}))
    before = contents(folder)
    lines: list[str] = []
    write_cache(make_config({**settings, "batch_size": 1}), say=lines.append)
    assert "is complete" in lines[0]
    (folder / "images" / "shard-00002.safetensors").unlink()
    config = make_config({**settings, "batch_size": 1})
    write_cache(config)
    assert contents(folder).keys() == before.keys()
    assert (folder / MANIFEST).read_bytes() == before[MANIFEST]
    dataset = CachedDataset(config, base_model_from_config(config), examples_from_config(config))
    assert [list(size) for size in dataset.buckets.sizes] == json.loads(before[MANIFEST])["buckets"]


def test_kills_at_any_moment(settings: dict[str, Any], tmp_path: Path, small_shards: None) -> None:
    """kill -9 while it writes; what comes out in the end is what comes out at once."""
    whole = write_cache(make_config({**settings, "cache": tmp_path / "whole"}))
    config, folder = make_config({**settings, "cache": tmp_path / "killed"}), tmp_path / "killed"
    made, total = 0, len(list(whole.glob("*/[!.]*.safetensors")))  # not the file that a kill cut off
    while made < total - 2:
        child = os.fork()
        if child == 0:
            _write_slowly(config)
            os._exit(0)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*/[!.]*.safetensors"))) <= made:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        made = len(list(folder.glob("*/[!.]*.safetensors")))
        assert manifest_of(config) == manifest_of(make_config({**settings, "cache": whole}))
    examples = examples_from_config(config)
    with pytest.raises(CacheError, match=r"images/shard-\d+\.safetensors is missing\. Run `ipadapter cache`"):
        CachedDataset(config, base_model_from_config(config), examples)
    lines: list[str] = []
    write_cache(config, say=lines.append)
    assert f"Resuming: {made} of {total} shards are written already." in "\n".join(lines)
    assert contents(folder) == contents(whole)


def test_a_kill_while_the_manifest_is_written(settings: dict[str, Any]) -> None:
    folder = Path(settings["cache"])
    folder.mkdir()
    (folder / ".manifest-01234567.tmp.json").write_text("{")
    write_cache(make_config(settings))
    assert sorted(p.name for p in folder.iterdir()) == ["captions", "images", MANIFEST]


def _write_slowly(config: TrainConfig) -> None:
    """So that kills come in the middle of a shard, too."""
    from ipadapter_trainer.cache import encode as cache_encode

    encode = cache_encode.encode_moments

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return encode(*arguments)

    cache_encode.encode_moments = slow
    write_cache(config)


def test_two_processes_write_what_one_does(
    settings: dict[str, Any], tmp_path: Path, small_shards: None, warm_python: WarmPython
) -> None:
    script = tmp_path / "cache.py"
    script.write_text(
        "import ipadapter_trainer.cache.plan as p\np.SHARD_BYTES = 4000\nfrom ipadapter_trainer.cli import main\nmain()"
    )
    settings |= {"kind": "plus", "num_workers": 1}
    python = str(warm_python.executable)
    # "--multi_gpu" is its launcher over torch.distributed; "--cpu" starts one process, whatever their number.
    launched = subprocess.run(
        [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        + ["--main_process_port", "0", script, "cache"]
        + keys(settings, cache=tmp_path / "two"),
        # PYTHON_EXEC is the Python of the workers.
        env={**process_environment(), "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "2 processes share the work" in launched.stdout
    assert launched.stdout.count("is complete: 18 images") == 1
    one = contents(write_cache(make_config({**settings, "cache": tmp_path / "one"})))
    assert len(one) > 6
    assert one == contents(tmp_path / "two")


# --- Parts


def test_no_shards_without_a_folder(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Name a folder with cache=\.\.\."):
        write_cache(make_config({**settings, "cache": None}))


def test_quantised_rows_are_near_although_some_channels_dwarf_the_others() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 257, 1280)
    features[..., 7] *= 100
    packed = pack_features(features, int8=True)
    values, scales = packed["image_features"], packed["image_features_scale"]
    assert values.dtype == torch.int8
    assert scales.shape == (3, 257, 20)
    again = unpack_features(packed).float()
    others = torch.arange(1280) >= 64
    assert (again - features)[..., others].norm() < 0.01 * features[..., others].norm()
    assert (again - features)[..., 7].norm() < 0.01 * features[..., 7].norm()
    assert values.numel() + 2 * scales.numel() < 0.52 * 2 * features.numel()
    zeros = unpack_features(pack_features(torch.zeros(2, 5, 30), int8=True))
    assert torch.equal(zeros, torch.zeros(2, 5, 30, dtype=torch.float16))


def test_a_manifest_that_lacks_one_of_several_shards(settings: dict[str, Any], small_shards: None) -> None:
    config = make_config(settings)
    folder = write_cache(config)
    before = contents(folder)
    manifest = manifest_of(config)
    manifest.shards.remove("images/shard-00000.safetensors")
    manifest.save(folder)
    with pytest.raises(CacheError, match=r"cache lacks \d+ of its 29 rows. Run `ipadapter cache`"):
        CachedDataset(config, base_model_from_config(config), examples_from_config(config))
    write_cache(make_config({**settings, "mixed_precision": "bf16"}))
    assert contents(folder) == before


def test_values_that_float16_cannot_hold_are_refused(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ipadapter_trainer.cache import encode as cache_encode

    encode = cache_encode.encode_moments
    monkeypatch.setattr(cache_encode, "encode_moments", lambda *a: tuple(m * 1e6 for m in encode(*a)))
    with pytest.raises(CacheError, match=r"latents_mean of images/shard-00000.* not finite in float16"):
        write_cache(make_config(settings))


def test_bytes_are_shown_for_people() -> None:
    shown = [show_bytes(count) for count in (5, 65536, 1.5e9, 2e15)]
    assert shown == ["5 bytes", "65.5 KB", "1.5 GB", "2000.0 TB"]


def test_the_manifest_is_read_back(settings: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(settings)
    write_cache(config)
    manifest = manifest_of(config)
    manifest.save(tmp_path)
    assert read_manifest(tmp_path, manifest.settings) == manifest


def test_an_image_that_can_be_read_again_is_cached(settings: dict[str, Any]) -> None:
    config = make_config(settings)
    whole = contents(write_cache(config))
    file = sorted(Path(settings["data"]).glob("*.png"))[3]
    image = file.read_bytes()
    shutil.rmtree(settings["cache"])
    file.write_bytes(b"not an image")
    lines: list[str] = []
    write_cache(config, say=lines.append)
    assert any("Could not be read and are left out: 1" in line for line in lines)
    write_cache(config, say=lines.append)  # it is still broken: nothing is done
    assert not any("Resuming" in line for line in lines)
    file.write_bytes(image)
    assert contents(write_cache(config)) == whole


def test_a_shard_of_other_tensors_is_made_again(settings: dict[str, Any], small_shards: None) -> None:
    config = make_config(settings)
    whole = contents(write_cache(config))
    file = Path(settings["cache"]) / "images" / "shard-00001.safetensors"
    good = file.read_bytes()
    for wrong in (b"latents_meen", b"rox"):
        file.write_bytes(good.replace(b"latents_mean" if wrong != b"rox" else b"row", wrong))
        with pytest.raises(CacheError, match=r"shard-00001.safetensors is damaged. Run `ipadapter cache`"):
            CachedDataset(config, base_model_from_config(config), examples_from_config(config))
        assert contents(write_cache(config)) == whole


def test_a_cache_made_again_during_a_training_is_named(settings: dict[str, Any], small_shards: None) -> None:
    config = make_config(settings)
    folder = write_cache(config)
    dataset = CachedDataset(config, base_model_from_config(config), examples_from_config(config))
    one, other = (folder / "images" / f"shard-0000{n}.safetensors" for n in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CacheError, match=r"shard-00000.safetensors was made again meanwhile, with other rows"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "value"), [("shards", ["captions/shard-00000.safetensors"] * 2), ("buckets", [[64, 0]])]
)
def test_an_impossible_manifest_is_damaged(settings: dict[str, Any], name: str, value: list[Any]) -> None:
    config = make_config(settings)
    file = write_cache(config) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(CacheError, match=r"manifest.json: not a cache's manifest \(it is damaged\)"):
        write_cache(config)
